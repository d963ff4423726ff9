/* A product of two values, neither of which is a weight; each value of `b` serves `repeat` values of `a`. */
static void multiply(const value *a, const value *b, value *out, int count, int repeat, int32_t multiplier, int shift)
{
    for (int i = 0; i < count; b++)
        for (int j = 0; j < repeat; j++, i++)
            out[i] = (value)limited(rounded((int64_t)(a[i] * *b) * multiplier, shift), 127);
}
