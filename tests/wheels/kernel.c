/* Calls the C kernel without Python and PyTorch, in one thread: so an emulator can run it for a
 * processor that this machine lacks. Prints the result and the gradients of inputs that are the same
 * everywhere, a number a line. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int fullattn_forward(const int64_t *, const float *, const int64_t *, const float *, const float *,
                     float, const float *, float *, const int64_t *, int);
int fullattn_backward(const int64_t *, const float *, const int64_t *, const float *,
                      const float *, float, const float *, const int64_t *, float *,
                      const int64_t *, float *, float *, int);

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    work(data);
}
void GOMP_barrier(void) {}
int omp_get_thread_num(void) { return 0; }
int omp_get_num_threads(void) { return 1; }

static uint32_t state = 1;

static float *numbers(int64_t count) {
    float *found = malloc(sizeof(float) * (size_t)count);
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        found[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    return found;
}

static void print(const float *found, int64_t count) {
    for (int64_t i = 0; i < count; i++) printf("%.9g\n", (double)found[i]);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    int64_t b = atoi(argv[1]), c = atoi(argv[2]), h = atoi(argv[3]), w = atoi(argv[4]);
    const int64_t sizes[] = {b, c, h, w}, strides[] = {c * h * w, h * w, w, 1};
    const int64_t count = b * c * h * w;
    float *x = numbers(count), *column_key = numbers(b * c * h), *row_key = numbers(b * c * w);
    float *grad = numbers(count), *out = numbers(count);
    if (fullattn_forward(sizes, x, strides, column_key, row_key, 0.5f, NULL, out, strides, 1))
        return 1;
    print(out, count);
    float *grad_column = numbers(b * c * h), *grad_row = numbers(b * c * w);
    if (fullattn_backward(sizes, x, strides, column_key, row_key, 0.5f, grad, strides, out, strides,
                          grad_column, grad_row, 1))
        return 1;
    print(out, count);
    print(grad_column, b * c * h);
    print(grad_row, b * c * w);
    return 0;
}
