/* A function of single values: there are only 256 of them. */
static void look_up(const value *in, value *out, int count, const int8_t *table)
{
    for (int i = 0; i < count; i++)
        out[i] = table[in[i] + 128];
}
