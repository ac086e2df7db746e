/* The passes around and between integer matrix products, and the whole of it for one token. Plain C, built at first use.
 *
 * Semantics are those of quantkit/numerics.py, bit for bit: build with -ffp-contract=off, so that a product is rounded
 * before it is rounded to an integer. Rows are independent, so threads share nothing.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { F32 = 0, BF16 = 1 };

#define ABSMAX_FLOOR 0x1p-96f
#define ROUND 12582912.0f /* 1.5 * 2**23: adding it rounds half to even and leaves the integer in the low bits */

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* Half to even; NaN stays NaN. */
static inline uint16_t to_bf16(float x) {
    uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* What is done to a row before it is quantized, in this order; 0 leaves a step out. Vectors are in the channels of the result. */
struct rewrite {
    const int32_t *order;                 /* x[order[i]] */
    const float *shift, *scale, *factors; /* (x - shift) * scale * factors: the signs of a rotation over sqrt(block) */
    int64_t block;                        /* then the Hadamard product of each block, a power of two */
};

enum { TILE = 64 };
static inline int64_t tiled(int64_t k) { return (k + TILE - 1) / TILE * TILE; }

/* Butterflies of neighbours: sums go to the first half, differences to the second. Repeated, that is strides 1, 2, 4, ...,
 * and after log2(TILE) times all is back in place. Without `mix` values only move. Loads and stores are whole vectors. */
static inline void butterflies(float *restrict y, const float *restrict x, int mix) {
    if (mix) for (int i = 0; i < TILE / 2; i++) { y[i] = x[2 * i] + x[2 * i + 1]; y[i + TILE / 2] = x[2 * i] - x[2 * i + 1]; }
    else for (int i = 0; i < TILE / 2; i++) { y[i] = x[2 * i]; y[i + TILE / 2] = x[2 * i + 1]; }
}

static inline void rotate_tiles(float *y, const float *x, const float *factors, int64_t k, int64_t block) {
    for (int64_t i = 0; i < k; i += TILE) {
        float t[TILE], u[TILE];
        for (int j = 0; j < TILE; j++) u[j] = x[i + j] * factors[i + j];
        butterflies(t, u, block > 1);
        butterflies(u, t, block > 2);
        butterflies(t, u, block > 4);
        butterflies(u, t, block > 8);
        butterflies(t, u, block > 16);
        butterflies(y + i, t, block > 32);
    }
}

/* Rotation.apply, to the bit: factors, then butterflies of strides 1, 2, 4, ..., block / 2. All have tiled(k) values; y may be x. */
static inline void rotate(float *y, const float *x, const float *factors, int64_t k, int64_t block) {
    if (block < TILE) rotate_tiles(y, x, factors, k, block);
    else rotate_tiles(y, x, factors, k, TILE);
    for (int64_t stride = TILE; stride < block; stride *= 2)
        for (int64_t from = 0; from < k; from += 2 * stride)
            for (int64_t i = from; i < from + stride; i++) {
                float a = y[i], b = y[i + stride];
                y[i] = a + b;
                y[i + stride] = a - b;
            }
}

/* Row `row` of x [m, k] in float32, rewritten. out has tiled(k) values. */
static inline void load_row(float *restrict out, const void *x, int64_t row, int64_t k, const struct rewrite *how, int type) {
    static const struct rewrite nothing;
    how = how ? how : &nothing;
    const int32_t *order = how->order;
    if (type == F32) {
        const float *in = (const float *)x + row * k;
        if (!order && !how->shift && !how->scale && how->block && k % TILE == 0) {
            rotate(out, in, how->factors, k, how->block); /* the common case, in one pass less */
            return;
        }
        if (order) for (int64_t i = 0; i < k; i++) out[i] = in[order[i]];
        else memcpy(out, in, (size_t)k * 4);
    } else {
        const uint16_t *in = (const uint16_t *)x + row * k;
        if (order) for (int64_t i = 0; i < k; i++) out[i] = from_bits((uint32_t)in[order[i]] << 16);
        else for (int64_t i = 0; i < k; i++) out[i] = from_bits((uint32_t)in[i] << 16);
    }
    if (how->shift) for (int64_t i = 0; i < k; i++) out[i] -= how->shift[i];
    if (how->scale) for (int64_t i = 0; i < k; i++) out[i] *= how->scale[i];
    if (how->block) {
        for (int64_t i = k; i < tiled(k); i++) out[i] = 0;
        rotate(out, out, how->factors, k, how->block);
    }
}

/* Groups of neighbouring channels, each with a scale of its own. A null pointer stands for one scale for all channels. */
struct groups {
    int64_t count;
    const int64_t *sizes;
    const float *shares;    /* how much of the int32 range a group takes up, core/groups.py */
    const int32_t *row_multipliers; /* [count, n]: multipliers of the rows of the weight */
};

/* Largest absolute value, as bits: those are in the order of the values, and Inf and NaN come last. */
static inline uint32_t largest(const float *x, int64_t k) {
    uint32_t top = 0;
    for (int64_t i = 0; i < k; i++) {
        uint32_t bits = to_bits(x[i]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

/* core/groups.py, with_multipliers: the scales [count] become a base scale and multipliers, [1 + count]. */
static inline void share(float *scale, const struct groups *c) {
    const float fineness = 0x1p17f;
    float top = 0;
    double parts = 0; /* whole numbers */
    for (int64_t g = 0; g < c->count; g++) {
        float term = scale[g] * c->shares[g];
        top = term > top ? term : top;
    }
    for (int64_t g = 0; g < c->count; g++) parts += ceilf(scale[g] * c->shares[g] / top * fineness);
    float base = (float)parts * (1 / fineness) * top;
    for (int64_t g = c->count; g > 0; g--) {
        float multiplier = 2 * ceilf((scale[g - 1] / base - 1) * 0.5f) + 1;
        scale[g] = multiplier > 1 ? multiplier : 1;
    }
    scale[0] = base;
}

/* Codes of one row of k values, and its scale; with groups a base scale and multipliers. If any value is NaN or Inf, the (base)
 * scale is NaN and all codes are 0. */
static inline void quantize_row(int8_t *restrict q, float *restrict scale, const float *restrict x, int64_t k,
                                const struct groups *c, float qmax) {
    int64_t count = c ? c->count : 1, from = 0;
    int finite = 1;
    for (int64_t g = 0; g < count; g++) {
        int64_t size = c ? c->sizes[g] : k;
        uint32_t top = largest(x + from, size);
        finite &= top < 0x7f800000;
        scale[g] = from_bits(top) > ABSMAX_FLOOR ? from_bits(top) : ABSMAX_FLOOR;
        from += size;
    }
    if (!finite) {
        memset(q, 0, (size_t)k);
        for (int64_t g = 0; g <= count; g++) if (g < count || c) scale[g] = 1;
        scale[0] = from_bits(0x7fc00000);
        return;
    }
    if (!c) {
        float inverse = qmax / scale[0];
        for (int64_t i = 0; i < k; i++) q[i] = (int8_t)(to_bits(x[i] * inverse + ROUND) & 0xff);
        scale[0] = scale[0] / qmax;
        return;
    }
    for (int64_t g = 0; g < count; g++) scale[g] = scale[g] / qmax;
    share(scale, c);
    from = 0;
    for (int64_t g = 0; g < count; g++) {
        float inverse = 1 / (scale[0] * scale[1 + g]);
        for (int64_t i = from; i < from + c->sizes[g]; i++) q[i] = (int8_t)(to_bits(x[i] * inverse + ROUND) & 0xff);
        from += c->sizes[g];
    }
}

/* x [m, k] of `type` -> q [m, k], scale [m] (with groups [m, 1 + count]). Returns 0, or 1 without memory. */
int quantkit_quantize(int8_t *q, float *scale, const void *x, const struct rewrite *how, const struct groups *c,
                      int64_t m, int64_t k, float qmax, int type, int threads) {
    int convert = type != F32 || how;
    int64_t room = tiled(k);
    float *scratch = convert ? malloc((size_t)(threads * room) * 4) : 0;
    if (convert && !scratch) return 1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        for (int64_t i = t * m / threads; i < (t + 1) * m / threads; i++) {
            const float *row = (const float *)x + i * k;
            if (convert) {
                load_row(scratch + t * room, x, i, k, how, type);
                row = scratch + t * room;
            }
            quantize_row(q + i * k, scale + i * (c ? 1 + c->count : 1), row, k, c, qmax);
        }
    }
    free(scratch);
    return 0;
}

/* Adds group g to the sum of groups, acc [m, n]; the first group starts the sum. What is added is
 * (product [m, n] - zero [m] * sums [n]) times the multiplier of the token, which lies in its scale [m, 1 + count], and times that of
 * the row. The zero points of tokens are zero_stride apart (0 for one in all), and zero may be a null pointer. */
void quantkit_group(int32_t *acc, const int32_t *product, const float *scale, const struct groups *c, int64_t g,
                      const int32_t *zero, int64_t zero_stride, const int32_t *sums, int64_t m, int64_t n, int threads) {
    const int32_t *row_multipliers = c->row_multipliers + g * n;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < m; i++) {
        int32_t multiplier = (int32_t)scale[i * (1 + c->count) + 1 + g];
        int32_t *row = acc + i * n;
        const int32_t *more = product + i * n;
        if (g == 0) memset(row, 0, (size_t)n * 4);
        if (zero) for (int64_t j = 0; j < n; j++) row[j] += multiplier * row_multipliers[j] * (more[j] - zero[i * zero_stride] * sums[j]);
        else for (int64_t j = 0; j < n; j++) row[j] += multiplier * row_multipliers[j] * more[j];
    }
}

static inline void finish_row(void *y, const int32_t *acc, float sx, const float *sw, const float *bias, int64_t n, int type) {
    if (type == F32) {
        float *out = (float *)y; /* may be acc itself */
        if (bias) for (int64_t j = 0; j < n; j++) out[j] = (float)acc[j] * sx * sw[j] + bias[j];
        else for (int64_t j = 0; j < n; j++) out[j] = (float)acc[j] * sx * sw[j];
    } else {
        uint16_t *out = (uint16_t *)y;
        for (int64_t j = 0; j < n; j++) out[j] = to_bf16((float)acc[j] * sx * sw[j] + (bias ? bias[j] : 0.0f));
    }
}

/* y [m, n] of `type` = acc * scale[m] * sw[n] + bias[n]. */
void quantkit_finish(void *y, const int32_t *acc, const float *scale, const float *sw, const float *bias,
                     int64_t m, int64_t n, int type, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < m; i++)
        finish_row((char *)y + i * n * (type == F32 ? 4 : 2), acc + i * n, scale[i], sw, bias, n, type);
}

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define ROWS 4
#define AHEAD 4096 /* bytes */
/* Four rows are read at once, which the processor does not see to be one stretch of memory: the same stretch is fetched ahead. */
static inline void fetch_ahead(const int8_t *w, int64_t i) {
    for (int r = 0; r < 4; r++) _mm_prefetch((const char *)(w + 4 * i + 64 * r + AHEAD), _MM_HINT_T0);
}
#endif

#ifdef __AVX512VNNI__
/* acc[r] = sum of q[i] * w[r * stride + i] for 4 rows, exact: dpbusd multiplies u8 by s8, so q + 128 goes in and 128 * sum(w) out. */
static inline void dot_rows(int32_t *acc, const int8_t *restrict q, const int8_t *restrict w, int64_t stride, int64_t k,
                            const int32_t *sums) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0;
    for (int64_t i = 0; i < k; i += 64) {
        fetch_ahead(w, i);
        __mmask64 in = k - i >= 64 ? ~0ull : (1ull << (k - i)) - 1;
        __m512i u = _mm512_xor_si512(_mm512_maskz_loadu_epi8(in, q + i), flip);
        a0 = _mm512_dpbusd_epi32(a0, u, _mm512_maskz_loadu_epi8(in, w + i));
        a1 = _mm512_dpbusd_epi32(a1, u, _mm512_maskz_loadu_epi8(in, w + stride + i));
        a2 = _mm512_dpbusd_epi32(a2, u, _mm512_maskz_loadu_epi8(in, w + 2 * stride + i));
        a3 = _mm512_dpbusd_epi32(a3, u, _mm512_maskz_loadu_epi8(in, w + 3 * stride + i));
    }
    acc[0] = _mm512_reduce_add_epi32(a0) - 128 * sums[0];
    acc[1] = _mm512_reduce_add_epi32(a1) - 128 * sums[1];
    acc[2] = _mm512_reduce_add_epi32(a2) - 128 * sums[2];
    acc[3] = _mm512_reduce_add_epi32(a3) - 128 * sums[3];
}
#elif defined(__AVX2__)
/* acc[r] = sum of q[i] * w[r * stride + i] for 4 rows, exact: |w| as u8 times q with the sign of w, two of which fit into int16, since
 * no code of an activation is -128. */
static inline void dot_rows(int32_t *acc, const int8_t *restrict q, const int8_t *restrict w, int64_t stride, int64_t k,
                            const int32_t *sums) {
    (void)sums;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(q + i));
        if (i % 64 == 0) fetch_ahead(w, i);
        for (int r = 0; r < 4; r++) {
            __m256i y = _mm256_loadu_si256((const __m256i *)(w + r * stride + i));
            __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(y), _mm256_sign_epi8(x, y));
            a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(pairs, ones));
        }
    }
    __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    _mm_storeu_si128((__m128i *)acc, _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
    for (; i < k; i++) for (int r = 0; r < 4; r++) acc[r] += (int32_t)q[i] * (int32_t)w[r * stride + i];
}
#else
#define ROWS 1
static inline void dot_rows(int32_t *acc, const int8_t *restrict q, const int8_t *restrict w, int64_t stride, int64_t k,
                            const int32_t *sums) {
    (void)sums, (void)stride;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += (int32_t)q[i] * (int32_t)w[i];
    acc[0] = sum;
}
#endif

static inline int32_t dot(const int8_t *restrict q, const int8_t *restrict w, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += (int32_t)q[i] * (int32_t)w[i];
    return sum;
}

/* ROWS (or fewer) outputs of one token, whose codes are q. */
static inline void token_rows(void *y, const int8_t *q, const float *sx, const int8_t *w, const int32_t *sums, const float *sw,
                              const float *bias, int64_t j, int64_t rows, int64_t n, int64_t k, const struct groups *c, int type) {
    int32_t acc[ROWS] = {0}, more[ROWS];
    int64_t count = c ? c->count : 1, from = 0;
    for (int64_t g = 0; g < count; g++) {
        int64_t size = c ? c->sizes[g] : k;
        const int8_t *at = w + j * k + from;
        if (rows == ROWS) dot_rows(more, q + from, at, k, size, sums + g * n + j);
        else for (int64_t r = 0; r < rows; r++) more[r] = dot(q + from, at + r * k, size);
        int32_t multiplier = c ? (int32_t)sx[1 + g] : 1;
        for (int64_t r = 0; r < rows; r++) acc[r] += multiplier * (c ? c->row_multipliers[g * n + j + r] : 1) * more[r];
        from += size;
    }
    finish_row((char *)y + j * (type == F32 ? 4 : 2), acc, sx[0], sw + j, bias ? bias + j : 0, rows, type);
}

/* The whole of one token: x [k] -> y [n], with w [n, k], sums [n] (of each group) of its rows, sw [n], bias [n] or 0.
 * Returns 0, or 1 without memory. */
int quantkit_token(void *y, const void *x, const struct rewrite *how, const int8_t *w, const int32_t *sums, const float *sw,
                   const float *bias, const struct groups *c, int64_t n, int64_t k, float qmax, int type, int threads) {
    int convert = type != F32 || how;
    int64_t room = convert ? tiled(k) : 0, count = c ? c->count : 1;
    float *scratch = malloc((size_t)((room + 1 + count) * 4 + k)); /* floats, if needed, then scales, then k codes */
    if (!scratch) return 1;
    float *sx = scratch + room;
    int8_t *q = (int8_t *)(sx + 1 + count);
    const float *row = (const float *)x;
    if (convert) {
        load_row(scratch, x, 0, k, how, type);
        row = scratch;
    }
    quantize_row(q, sx, row, k, c, qmax);
    int64_t blocks = n / ROWS;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) token_rows(y, q, sx, w, sums, sw, bias, b * ROWS, ROWS, n, k, c, type);
    for (int64_t j = blocks * ROWS; j < n; j++) token_rows(y, q, sx, w, sums, sw, bias, j, 1, n, k, c, type);
    free(scratch);
    return 0;
}

#include "program.c"
