/* Layers whose weights were not constrained: ordinary products. */
static void multiply_line(total *sums, int count, weight w, const value *line, int width, int column, int step)
{
    int x = 0;
    for (; column < 0; column += step)
        x++;
    for (; x < count && column < width; x++, column += step)
        sums[x] += (total)w * line[column];
}

static void ordinary_layer(const value *in, const convolution *c, const weight *weights, const finishing *how)
{
    static total sums[LONGEST_LINE];
    const weight *row = weights;
    int channel = 0, at = 0;
    for (int group = 0; group < c->groups; group++, in += c->group_values) {
        for (int output = 0; output < c->outputs; output++, channel++) {
            int top = c->top, top_value = c->top_value;
            for (int y = 0; y < c->out_height; y++, top += c->down, top_value += c->down_values) {
                const weight *w = row;
                int plane = 0;
                for (int x = 0; x < c->out_width; x++)
                    sums[x] = 0;
                for (int input = 0; input < c->inputs; input++, plane += c->plane) {
                    int line = top, first = plane + top_value;
                    for (int v = 0; v < c->kernel_height; v++, line += c->below, first += c->below_values) {
                        int column = c->left, inside = line >= 0 && line < c->height;
                        for (int u = 0; u < c->kernel_width; u++, column += c->right, w++)
                            if (inside)
                                multiply_line(sums, c->out_width, *w, in + first, c->width, column, c->across);
                    }
                }
                finish(how, channel, sums, c->out_width, at);
                at += c->out_width;
            }
            row += c->inputs * c->kernel_height * c->kernel_width;
        }
    }
}
