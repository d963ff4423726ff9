/* A scale and a bias per channel, each of `count` values, which may be in the place of the output. */
static void affine(const value *in, int channels, int count, const finishing *how)
{
    int at = 0;
    for (int channel = 0; channel < channels; channel++)
        for (int i = 0; i < count; i++, at++) {
            total sum = in[at];
            finish(how, channel, &sum, 1, at);
        }
}
