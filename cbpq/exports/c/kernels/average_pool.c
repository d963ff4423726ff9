static void average_pool(const value *in, value *out, int channels, int height, int width, const window *rows,
                         int out_height, const window *columns, int out_width, ratio how)
{
    for (int channel = 0; channel < channels; channel++, in += height * width)
        for (int y = 0; y < out_height; y++)
            for (int x = 0; x < out_width; x++) {
                total sum = 0;
                for (int v = rows[y].start; v < rows[y].end; v++)
                    for (int u = columns[x].start; u < columns[x].end; u++)
                        sum += in[v * width + u];
                *out++ = quotient(sum, rows[y].count * columns[x].count, how);
            }
}
