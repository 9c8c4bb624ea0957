/* Attention of one new position a row over a paged cache, float32, on the CPU: see native.py.
 *
 * One task is one row and one key-value head: it writes the new key and value to their place, then reads the
 * row's blocks once, keeping a running softmax in base 2. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define MAX_WIDTH 512
#define MAX_SIZE 512

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

typedef struct {
    float *out;           /* [rows, heads, each, width] */
    const float *query;   /* [rows, heads, each, width] */
    const float *fresh_k; /* [rows, heads, width] */
    const float *fresh_v; /* the same */
    float *keys;          /* [blocks, heads, size, width] */
    float *values;        /* the same */
    const int64_t *table; /* [rows, most] a row's blocks: its own in order, then its prompt's */
    const int64_t *own;   /* [rows] how many of them are its own */
    const int64_t *length; /* [rows] index of the new position in the response */
    const int64_t *shared; /* [rows] positions of the prompt */
    const int64_t *block;  /* [rows] where the new position goes: block, */
    const int64_t *offset; /* [rows] and place in it */
    const uint8_t *hidden; /* [blocks, size] positions that an evicted row does not see, or null */
    const uint8_t *evicted; /* [rows], or null */
    int64_t rows, heads, each, width, size, most;
    float scale; /* of scores, for base 2 */
} Step;

/* 2^x for x <= 0: the whole part goes into the exponent, a polynomial does the rest (relative error 8e-8). */
static inline float power_of_two(float x) {
    x = x < -126.0f ? -126.0f : x;
    float whole = floorf(x), part = x - whole;
    float p = 2.1431568e-5f;
    p = p * part + 1.4376707e-4f;
    p = p * part + 1.3419113e-3f;
    p = p * part + 9.6142739e-3f;
    p = p * part + 5.5505026e-2f;
    p = p * part + 2.4022640e-1f;
    p = p * part + 6.9314718e-1f;
    p = p * part + 1.0f;
    union { float f; int32_t i; } bits = { .f = p };
    bits.i += (int32_t)whole << 23;
    return bits.f;
}

static inline vec load(const float *from) { return *(const vec *)from; }

static inline float total(vec a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

/* One query over a row's blocks. `lanes` is width / LANES: a constant where this is inlined with one, so that the
 * query and the sums stay in registers. */
static inline __attribute__((always_inline)) void attend(
    const Step *s, int64_t row, int64_t head, const float *query, float *out, const int64_t lanes)
{
    const int64_t width = lanes * LANES, area = s->size * width;
    vec q[MAX_WIDTH / LANES], sum[MAX_WIDTH / LANES];
    float weight[MAX_SIZE], top = -INFINITY, mass = 0.0f;
    for (int64_t i = 0; i < lanes; i++) { q[i] = load(query + i * LANES) * s->scale; sum[i] = (vec){0}; }
    for (int64_t j = 0; j < s->most; j++) {
        const int mine = j < s->own[row];
        int64_t fill = mine ? s->length[row] + 1 - j * s->size : s->shared[row] - (j - s->own[row]) * s->size;
        if (fill <= 0) { if (mine) continue; else break; }
        if (fill > s->size) fill = s->size;
        const int64_t b = s->table[row * s->most + j];
        const float *k = s->keys + (b * s->heads + head) * area, *v = s->values + (b * s->heads + head) * area;
        const uint8_t *unseen = s->hidden && !mine && s->evicted[row] ? s->hidden + b * s->size : 0;
        float best = top;
        for (int64_t t = 0; t < fill; t++) {
            vec a = (vec){0};
            for (int64_t i = 0; i < lanes; i++) {
                a += q[i] * load(k + t * width + i * LANES);
                if (i % 2 == 0) __builtin_prefetch(v + t * width + i * LANES); /* a block is a page: help over its edge */
            }
            weight[t] = unseen && unseen[t] ? -INFINITY : total(a);
            best = weight[t] > best ? weight[t] : best;
        }
        if (best == -INFINITY) continue; /* nothing to see in this block */
        const float less = top == -INFINITY ? 0.0f : power_of_two(top - best);
        mass *= less;
        for (int64_t i = 0; i < lanes; i++) sum[i] *= less;
        top = best;
        float added = 0.0f;
        #pragma omp simd reduction(+ : added)
        for (int64_t t = 0; t < fill; t++) {
            weight[t] = weight[t] == -INFINITY ? 0.0f : power_of_two(weight[t] - top);
            added += weight[t];
        }
        mass += added;
        const int64_t after = j + 1 < s->most ? s->table[row * s->most + j + 1] : b;
        const float *next = s->keys + (after * s->heads + head) * area;
        for (int64_t t = 0; t < fill; t++)
            for (int64_t i = 0; i < lanes; i++) {
                sum[i] += weight[t] * load(v + t * width + i * LANES);
                if (i % 2 == 0) __builtin_prefetch(next + t * width + i * LANES);
            }
    }
    const float scale = mass > 0.0f ? 1.0f / mass : 0.0f;
    for (int64_t i = 0; i < lanes; i++) *(vec *)(out + i * LANES) = sum[i] * scale;
}

void mirage_attend(const Step *s, int threads)
{
    #pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < s->rows * s->heads; task++) {
        const int64_t row = task / s->heads, head = task % s->heads, width = s->width;
        const int64_t place = ((s->block[row] * s->heads + head) * s->size + s->offset[row]) * width;
        memcpy(s->keys + place, s->fresh_k + task * width, width * sizeof(float));
        memcpy(s->values + place, s->fresh_v + task * width, width * sizeof(float));
        for (int64_t g = 0; g < s->each; g++) {
            const float *query = s->query + (task * s->each + g) * width;
            float *out = s->out + (task * s->each + g) * width;
            switch (width) {
                case 32: attend(s, row, head, query, out, 4); break;
                case 64: attend(s, row, head, query, out, 8); break;
                default: attend(s, row, head, query, out, width / LANES);
            }
        }
    }
}
