/* The input rows (or columns) start to end - 1 of one output row; an average divides as if there were `count`. */
typedef struct {
    int start, end, count;
} window;
