/* Arithmetic: values are int8, each value of the network with a scale of its own; sums are int32; no floats. */
typedef int8_t value;
typedef int32_t total;
typedef int8_t weight;

/* What becomes of the sums of a layer: (sum * multiplier + bias) / 2^shift, each of them per output channel. The last
   layer writes to `scores` instead of `out`. */
typedef struct {
    value *out;
    int32_t *scores;
    const int32_t *multiplier;
    const uint8_t *shift;
    const int64_t *bias;
} finishing;

/* v / 2^shift, rounded to the nearest, and from the middle away from zero. */
static int64_t rounded(int64_t v, int shift)
{
    int64_t half = shift > 0 ? INT64_C(1) << (shift - 1) : 0;
    return v < 0 ? -((-v + half) >> shift) : (v + half) >> shift;
}

static int64_t limited(int64_t v, int64_t most)
{
    return v < -most ? -most : v > most ? most : v;
}

/* Finish `count` sums of one channel and write them to out[at], out[at + 1], ... This is the only multiplication of a
   layer with constrained weights: one per output, none per weight. */
static void finish(const finishing *how, int channel, const total *sums, int count, int at)
{
    for (int i = 0; i < count; i++) {
        int64_t product = (int64_t)sums[i] * how->multiplier[channel] + how->bias[channel];
        int64_t result = rounded(product, how->shift[channel]);
        if (how->scores)
            how->scores[at + i] = (int32_t)limited(result, INT32_MAX);
        else
            how->out[at + i] = (value)limited(result, 127);
    }
}
