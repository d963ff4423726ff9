/* Copy values in four nested loops: slices, transpositions, concatenations and what is inside a padding. */
typedef struct {
    int sizes[4], steps[4], out_steps[4];
} piece;

static void copy(const value *in, value *out, const piece *p)
{
    for (int i = 0; i < p->sizes[0]; i++)
        for (int j = 0; j < p->sizes[1]; j++)
            for (int k = 0; k < p->sizes[2]; k++)
                for (int l = 0; l < p->sizes[3]; l++)
                    out[i * p->out_steps[0] + j * p->out_steps[1] + k * p->out_steps[2] + l * p->out_steps[3]] =
                        in[i * p->steps[0] + j * p->steps[1] + k * p->steps[2] + l * p->steps[3]];
}
