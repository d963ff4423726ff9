/* Runs the golden pictures of golden.h; exit code 0 if every score is exactly as expected. */
#include <stdio.h>

#include "golden.h"
#include "network.h"

int main(void)
{
    static int8_t input[CBPQ_INPUT_SIZE];
    static int32_t scores[CBPQ_CLASSES];
    int wrong = 0;
    for (int n = 0; n < GOLDEN_COUNT; n++) {
        cbpq_normalize(golden_pixels[n], input);
        cbpq_run(input, scores);
        for (int i = 0; i < CBPQ_CLASSES; i++)
            wrong += scores[i] != golden_scores[n][i];
    }
    printf("wrong scores: %d of %d\n", wrong, GOLDEN_COUNT * CBPQ_CLASSES);
    return wrong != 0;
}
