static void max_pool(const value *in, value *out, int channels, int height, int width, const window *rows,
                     int out_height, const window *columns, int out_width)
{
    for (int channel = 0; channel < channels; channel++, in += height * width)
        for (int y = 0; y < out_height; y++)
            for (int x = 0; x < out_width; x++) {
                value most = in[rows[y].start * width + columns[x].start];
                for (int v = rows[y].start; v < rows[y].end; v++)
                    for (int u = columns[x].start; u < columns[x].end; u++)
                        if (in[v * width + u] > most)
                            most = in[v * width + u];
                *out++ = most;
            }
}
