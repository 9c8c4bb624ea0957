/* Attention of one new position a row over a paged cache, on the CPU: see native.py. Queries, new keys and values and
 * the result are float32; the cache is float32, bfloat16 or, where the processor converts it (F16C), float16.
 *
 * One task is one row and one key-value head: it writes the new key and value to their place, then reads the
 * row's blocks once, keeping a running softmax in base 2. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define LANES 8
#define MAX_WIDTH 512
#define MAX_SIZE 512

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(4)));
typedef uint16_t shorts __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2)));

enum { FULL, HALF, BRAIN }; /* what the cache holds: float32, float16, bfloat16 */

typedef struct {
    float *out;           /* [rows, heads, each, width] */
    const float *query;   /* [rows, heads, each, width] */
    const float *fresh_k; /* [rows, heads, width] */
    const float *fresh_v; /* the same */
    void *keys;           /* [blocks, heads, size, width] */
    void *values;         /* the same */
    const int64_t *table; /* [rows, most] a row's blocks: its own in order, then its prompt's */
    const int64_t *own;   /* [rows] how many of them are its own */
    const int64_t *length; /* [rows] index of the new position in the response */
    const int64_t *shared; /* [rows] positions of the prompt */
    const int64_t *block;  /* [rows] where the new position goes: block, */
    const int64_t *offset; /* [rows] and place in it */
    const uint8_t *hidden; /* [blocks, size] positions that an evicted row does not see, or null */
    const uint8_t *evicted; /* [rows], or null */
    int64_t rows, heads, each, width, size, most;
    int64_t kind;         /* what the cache holds */
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
    union { float f; int32_t i; } found = { .f = p };
    found.i += (int32_t)whole << 23;
    return found.f;
}

static inline vec load(const float *from) { return *(const vec *)from; }

/* LANES numbers of the cache, the first of them at index `at`. */
static inline vec cached(const void *store, int64_t at, const int kind)
{
    if (kind == BRAIN) /* the upper half of a float32 */
        return (vec)(__builtin_convertvector(*(const shorts *)((const uint16_t *)store + at), bits) << 16);
#ifdef __F16C__
    if (kind == HALF) return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)store + at)));
#endif
    return load((const float *)store + at);
}

static inline void keep(void *store, int64_t at, const float *from, int64_t width, const int kind)
{
    if (kind == BRAIN) { /* to the nearest, ties to even */
        for (int64_t i = 0; i < width; i += LANES) {
            const bits b = (bits)load(from + i);
            *(shorts *)((uint16_t *)store + at + i) = __builtin_convertvector((b + 0x7fff + (b >> 16 & 1)) >> 16, shorts);
        }
        return;
    }
#ifdef __F16C__
    if (kind == HALF) {
        for (int64_t i = 0; i < width; i += LANES)
            _mm_storeu_si128((__m128i *)((uint16_t *)store + at + i),
                             _mm256_cvtps_ph((__m256)load(from + i), _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
    memcpy((float *)store + at, from, width * sizeof(float));
}

static inline const void *where(const void *store, int64_t at, const int kind)
{
    return (const char *)store + at * (kind == FULL ? sizeof(float) : sizeof(uint16_t));
}

static inline float total(vec a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

/* The sums of LANES vectors. */
static inline vec totals(const vec *a)
{
#ifdef __AVX__
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a[0], (__m256)a[1]), _mm256_hadd_ps((__m256)a[2], (__m256)a[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a[4], (__m256)a[5]), _mm256_hadd_ps((__m256)a[6], (__m256)a[7]));
    return (vec)(_mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31));
#else
    vec found;
    for (int t = 0; t < LANES; t++) found[t] = total(a[t]);
    return found;
#endif
}

/* One query over a row's blocks. `lanes` is width / LANES: a constant where this is inlined with one, so that the
 * query and the sums stay in registers; so is `kind`. */
static inline __attribute__((always_inline)) void attend(
    const Step *s, int64_t row, int64_t head, const float *query, float *out, const int64_t lanes, const int kind)
{
    const int64_t width = lanes * LANES, area = s->size * width;
    const int64_t step = kind == FULL ? 2 : 4; /* loads of a cache line */
    vec q[MAX_WIDTH / LANES], sum[MAX_WIDTH / LANES];
    float weight[MAX_SIZE + LANES], top = -INFINITY, mass = 0.0f;
    for (int64_t i = 0; i < lanes; i++) { q[i] = load(query + i * LANES) * s->scale; sum[i] = (vec){0}; }
    for (int64_t j = 0; j < s->most; j++) {
        const int mine = j < s->own[row];
        int64_t fill = mine ? s->length[row] + 1 - j * s->size : s->shared[row] - (j - s->own[row]) * s->size;
        if (fill <= 0) { if (mine) continue; else break; }
        if (fill > s->size) fill = s->size;
        const int64_t b = s->table[row * s->most + j];
        const void *k = where(s->keys, (b * s->heads + head) * area, kind);
        const void *v = where(s->values, (b * s->heads + head) * area, kind);
        const uint8_t *unseen = s->hidden && !mine && s->evicted[row] ? s->hidden + b * s->size : 0;
        int64_t t = 0;
        for (; t + LANES <= s->size && t < fill; t += LANES) { /* what lies beyond `fill` is scored and not looked at */
            vec a[LANES];
            #pragma GCC unroll 8
            for (int u = 0; u < LANES; u++) {
                a[u] = q[0] * cached(k, (t + u) * width, kind);
                for (int64_t i = 1; i < lanes; i++) a[u] += q[i] * cached(k, (t + u) * width + i * LANES, kind);
                for (int64_t i = 0; i < lanes; i += step) /* a block is a page: help over its edge */
                    __builtin_prefetch(where(v, (t + u) * width + i * LANES, kind));
            }
            *(vec *)(weight + t) = totals(a);
        }
        for (; t < fill; t++) {
            vec a = q[0] * cached(k, t * width, kind);
            for (int64_t i = 1; i < lanes; i++) a += q[i] * cached(k, t * width + i * LANES, kind);
            weight[t] = total(a);
        }
        if (unseen)
            for (t = 0; t < fill; t++) weight[t] = unseen[t] ? -INFINITY : weight[t];
        float best = top;
        #pragma omp simd reduction(max : best)
        for (t = 0; t < fill; t++) best = weight[t] > best ? weight[t] : best;
        if (best == -INFINITY) continue; /* nothing to see in this block */
        const float less = top == -INFINITY ? 0.0f : power_of_two(top - best);
        mass *= less;
        for (int64_t i = 0; i < lanes; i++) sum[i] *= less;
        top = best;
        float added = 0.0f;
        #pragma omp simd reduction(+ : added)
        for (t = 0; t < fill; t++) {
            weight[t] = weight[t] == -INFINITY ? 0.0f : power_of_two(weight[t] - top);
            added += weight[t];
        }
        mass += added;
        const int64_t after = j + 1 < s->most ? s->table[row * s->most + j + 1] : b;
        const void *next = where(s->keys, (after * s->heads + head) * area, kind);
        for (t = 0; t < fill; t++)
            for (int64_t i = 0; i < lanes; i++) {
                sum[i] += weight[t] * cached(v, t * width + i * LANES, kind);
                if (i % step == 0) __builtin_prefetch(where(next, t * width + i * LANES, kind));
            }
    }
    const float scale = mass > 0.0f ? 1.0f / mass : 0.0f;
    for (int64_t i = 0; i < lanes; i++) *(vec *)(out + i * LANES) = sum[i] * scale;
}

static inline __attribute__((always_inline)) void attend_any(
    const Step *s, int64_t row, int64_t head, const float *query, float *out, const int kind)
{
    switch (s->width) {
        case 32: attend(s, row, head, query, out, 4, kind); break;
        case 64: attend(s, row, head, query, out, 8, kind); break;
        default: attend(s, row, head, query, out, s->width / LANES, kind);
    }
}

/* Whether a float16 cache can be read. */
int mirage_half(void)
{
#ifdef __F16C__
    return 1;
#else
    return 0;
#endif
}

void mirage_attend(const Step *s, int threads)
{
    #pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < s->rows * s->heads; task++) {
        const int64_t row = task / s->heads, head = task % s->heads, width = s->width;
        const int64_t place = ((s->block[row] * s->heads + head) * s->size + s->offset[row]) * width;
        keep(s->keys, place, s->fresh_k + task * width, width, s->kind);
        keep(s->values, place, s->fresh_v + task * width, width, s->kind);
        for (int64_t g = 0; g < s->each; g++) {
            const float *query = s->query + (task * s->each + g) * width;
            float *out = s->out + (task * s->each + g) * width;
            switch (s->kind) {
                case HALF: attend_any(s, row, head, query, out, HALF); break;
                case BRAIN: attend_any(s, row, head, query, out, BRAIN); break;
                default: attend_any(s, row, head, query, out, FULL);
            }
        }
    }
}
