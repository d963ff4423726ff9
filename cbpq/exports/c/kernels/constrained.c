/* Layers whose weights are constrained: no input is ever multiplied by a weight.

   A weight is a level times the scale of its channel. A level is a small integer, plus or minus a sum of powers of two,
   usually of one power. There is one line of sums per power of two. An input is added to the sums of the powers in the
   level, or subtracted from them. At the end of an output line the sums are combined by doubling, t + t. The scale is
   part of what `finish` does, once per output. */

/* Packed levels: each output channel starts on a byte, the index of a level takes `bits` bits, the least significant
   first. */
typedef struct {
    const uint8_t *codes;
    int row_bytes;
    int bits;
    const int16_t *levels;
    int powers; /* the levels have the powers of two from 0 to powers - 1 */
} constrained_weights;

static int next_index(const uint8_t **byte, int *bit, int bits)
{
    int index = **byte >> *bit;
    *bit += bits;
    if (*bit >= 8) {
        ++*byte;
        *bit -= 8;
        if (*bit > 0)
            index |= **byte << (bits - *bit);
    }
    return index & ((1 << bits) - 1);
}

/* For every output x of a line whose input is inside the picture: sums[x] += or -= that input. */
static void add_line(total *sums, int count, const value *line, int width, int column, int step, int negative)
{
    int x = 0;
    for (; column < 0; column += step)
        x++;
    if (negative)
        for (; x < count && column < width; x++, column += step)
            sums[x] -= line[column];
    else
        for (; x < count && column < width; x++, column += step)
            sums[x] += line[column];
}

static void constrained_layer(const value *in, const convolution *c, const constrained_weights *w,
                              const finishing *how)
{
    static total sums[MOST_POWERS][LONGEST_LINE];
    const uint8_t *row = w->codes;
    int channel = 0, at = 0;
    for (int group = 0; group < c->groups; group++, in += c->group_values) {
        for (int output = 0; output < c->outputs; output++, channel++, row += w->row_bytes) {
            int top = c->top, top_value = c->top_value;
            for (int y = 0; y < c->out_height; y++, top += c->down, top_value += c->down_values) {
                const uint8_t *byte = row;
                int bit = 0, plane = 0;
                for (int power = 0; power < w->powers; power++)
                    for (int x = 0; x < c->out_width; x++)
                        sums[power][x] = 0;
                for (int input = 0; input < c->inputs; input++, plane += c->plane) {
                    int line = top, first = plane + top_value;
                    for (int v = 0; v < c->kernel_height; v++, line += c->below, first += c->below_values) {
                        int column = c->left, inside = line >= 0 && line < c->height;
                        for (int u = 0; u < c->kernel_width; u++, column += c->right) {
                            int level = w->levels[next_index(&byte, &bit, w->bits)];
                            unsigned powers = (unsigned)(level < 0 ? -level : level);
                            for (int power = 0; inside && powers != 0; power++, powers >>= 1)
                                if (powers & 1)
                                    add_line(sums[power], c->out_width, in + first, c->width, column, c->across,
                                             level < 0);
                        }
                    }
                }
                for (int power = w->powers - 1; power > 0; power--)
                    for (int x = 0; x < c->out_width; x++)
                        sums[power - 1][x] += sums[power][x] + sums[power][x];
                finish(how, channel, sums[0], c->out_width, at);
                at += c->out_width;
            }
        }
    }
}
