/* Runs the golden pictures of golden.h; exit code 0 if the logits are those of the original network. */
#include <stdio.h>

#include "golden.h"
#include "network.h"

int main(void)
{
    static float input[CBPQ_INPUT_SIZE], logits[CBPQ_CLASSES];
    double largest = 0, difference = 0;
    int wrong = 0;
    for (int n = 0; n < GOLDEN_COUNT; n++)
        for (int i = 0; i < CBPQ_CLASSES; i++) {
            double size = golden_logits[n][i] < 0 ? -golden_logits[n][i] : golden_logits[n][i];
            largest = size > largest ? size : largest;
        }
    for (int n = 0; n < GOLDEN_COUNT; n++) {
        cbpq_normalize(golden_pixels[n], input);
        cbpq_run(input, logits);
        for (int i = 0; i < CBPQ_CLASSES; i++) {
            double apart = (double)logits[i] - golden_logits[n][i];
            apart = apart < 0 ? -apart : apart;
            difference = apart > difference ? apart : difference;
            wrong += !(apart <= GOLDEN_TOLERANCE * largest); /* counts what is not a number, too */
        }
    }
    printf("largest difference %.9g, largest logit %.9g, beyond the tolerance %d\n", difference, largest, wrong);
    return wrong != 0;
}
