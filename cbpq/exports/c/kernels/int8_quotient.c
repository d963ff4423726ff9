/* How a sum becomes an average in the output's scale: sum * multiplier / (count * 2^shift), rounded as above. */
typedef struct {
    int32_t multiplier;
    int shift;
} ratio;

static value quotient(total sum, int count, ratio how)
{
    int64_t product = (int64_t)sum * how.multiplier, divisor = (int64_t)count << how.shift;
    int64_t half = divisor / 2;
    return (value)limited(product < 0 ? -((-product + half) / divisor) : (product + half) / divisor, 127);
}
