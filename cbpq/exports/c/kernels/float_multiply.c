/* A product of two values, neither of which is a weight; each value of `b` serves `repeat` values of `a`. */
static void multiply(const value *a, const value *b, value *out, int count, int repeat)
{
    for (int i = 0; i < count; b++)
        for (int j = 0; j < repeat; j++, i++)
            out[i] = a[i] * *b;
}
