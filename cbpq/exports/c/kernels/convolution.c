/* The shape of a convolution. A linear layer is one of 1 x 1 pixel. Channels are those of one group. Whatever is a
   product of other numbers is stored too, so that the loops only add. */
typedef struct {
    int groups, inputs, outputs;
    int height, width, plane, group_values; /* of the input; plane = height * width, group_values = inputs * plane */
    int out_height, out_width;
    int kernel_height, kernel_width;
    int top, top_value, left;       /* minus the padding; top_value = top * width */
    int down, down_values, across;  /* the stride; down_values = down * width */
    int below, below_values, right; /* the dilation; below_values = below * width */
} convolution;
