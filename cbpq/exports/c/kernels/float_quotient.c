/* How a sum becomes an average; in float there is nothing more to know. */
typedef int ratio;

static value quotient(total sum, int count, ratio how)
{
    (void)how;
    return sum / (value)count;
}
