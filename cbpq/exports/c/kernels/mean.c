/* The mean over the middle one of three axes. */
static void mean(const value *in, value *out, int outer, int count, int inner, ratio how)
{
    for (int i = 0; i < outer; i++, in += count * inner)
        for (int j = 0; j < inner; j++) {
            total sum = 0;
            for (int k = 0; k < count; k++)
                sum += in[k * inner + j];
            *out++ = quotient(sum, count, how);
        }
}
