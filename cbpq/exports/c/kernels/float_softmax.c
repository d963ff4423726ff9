/* exp(x) / sum of exp(x) along the middle one of three axes. */
static void softmax(const value *in, value *out, int outer, int count, int inner)
{
    for (int i = 0; i < outer; i++, in += count * inner, out += count * inner)
        for (int j = 0; j < inner; j++) {
            float most = in[j], sum = 0;
            for (int k = 1; k < count; k++)
                if (in[k * inner + j] > most)
                    most = in[k * inner + j];
            for (int k = 0; k < count; k++)
                sum += out[k * inner + j] = expf(in[k * inner + j] - most);
            for (int k = 0; k < count; k++)
                out[k * inner + j] /= sum;
        }
}
