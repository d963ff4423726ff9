static void clear(value *out, int count)
{
    for (int i = 0; i < count; i++)
        out[i] = 0;
}
