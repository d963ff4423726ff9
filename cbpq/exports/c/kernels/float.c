/* Arithmetic: everything is float. */
typedef float value;
typedef float total;
typedef float weight;

/* What becomes of the sums of a layer: one scale and one bias per output channel. */
typedef struct {
    value *out;
    const float *scale;
    const float *bias;
} finishing;

/* Finish `count` sums of one channel and write them to out[at], out[at + 1], ... This is the only multiplication of a
   layer with constrained weights: one per output, none per weight. */
static void finish(const finishing *how, int channel, const total *sums, int count, int at)
{
    for (int i = 0; i < count; i++)
        how->out[at + i] = how->scale[channel] * sums[i] + how->bias[channel];
}
