/* A sum, each part in the output's scale by a multiplier; each value of `b` serves `repeat` values of `a`. */
static void add(const value *a, const value *b, value *out, int count, int repeat, int32_t multiplier_a,
                int32_t multiplier_b, int shift)
{
    for (int i = 0; i < count; b++)
        for (int j = 0; j < repeat; j++, i++) {
            int64_t sum = (int64_t)a[i] * multiplier_a + (int64_t)*b * multiplier_b;
            out[i] = (value)limited(rounded(sum, shift), 127);
        }
}
