/* A list of small operations at fixed addresses, run one after the other: what PyTorch would do for a token, without PyTorch.
 *
 * Beside the products of its layers a token has little to compute, and its operators cost their calls. Here a call is a turn of a
 * loop. Whoever writes the list keeps the memory alive. Included by native.c, whose passes it uses.
 *
 * Floating point is float32, or bfloat16 that is computed in float32 and rounded once, as PyTorch does it.
 */

enum { LONG = 2, BOOL = 3 }; /* beside F32 and BF16 */
enum {
    ADD, SUB, MUL, DIV, LE, LT, GE, GT, EQ, NE, AND, OR, WHERE,                                /* of two or three */
    COPY, NEG, RSQRT, SQRT, SQUARE, EXP, SILU, RELU, TANH, SIGMOID, GELU, GELU_TANH, COS, SIN, /* of one */
    MEAN, LAYER_NORM, INDEX_COPY, EMBEDDING, ATTENTION, LINEARS
};

enum { DIMS = 4 };

struct view { char *data; int64_t strides[DIMS]; }; /* in elements; 0 where it is broadcast */

/* One layer of those that read the same rows: as the arguments of quantkit_token. */
struct layer { char *y; const int8_t *w; const int32_t *sums; const float *sw, *bias; const struct groups *c; int64_t n; };

/* What is added to scores, or which keys count. */
struct mask { const char *data; int64_t strides[DIMS]; int64_t type; };

struct instruction {
    int64_t op, type, to; /* types of what is read and written */
    int64_t sizes[DIMS];
    struct view out, a, b, c;
    double scalar;
    const void *how; /* struct rewrite of layers, struct mask of attention, or 0 */
    struct layer *layers;
    int64_t count, k;
    float *scratch;
};

typedef uint16_t half; /* bfloat16 */
static inline float get(const void *x, int64_t i, int64_t type) {
    return type == F32 ? ((const float *)x)[i] : from_bits((uint32_t)((const half *)x)[i] << 16);
}
static inline void put(void *x, int64_t i, int64_t type, float value) {
    if (type == F32) ((float *)x)[i] = value;
    else ((half *)x)[i] = to_bf16(value);
}
static inline int64_t bytes(int64_t type) { return type == F32 ? 4 : type == BF16 ? 2 : type == LONG ? 8 : 1; }
static inline char *place(const struct view *v, int64_t type, int64_t i, int64_t j, int64_t l) {
    return v->data + (i * v->strides[0] + j * v->strides[1] + l * v->strides[2]) * bytes(type);
}

/* e^x to the last bit or two, in a form that loops over it become vectors of; x below -87 gives what -87 gives. */
static inline float exponential(float x) {
    float y = x < -87.0f ? -87.0f : x > 88.7228f ? 88.7228f : x;
    float shifted = y * 1.44269504f + ROUND, n = shifted - ROUND;
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float scale = from_bits((to_bits(shifted) - to_bits(ROUND) + 126) << 23); /* half of it: 2^128 is no float */
    p = p * scale * 2;
    return x > 88.7228f ? INFINITY : x != x ? x : p;
}

/* Sum of q[e] * key[e], in 16 sums side by side. */
#define DOT(sum, key, load) do {                                                                                     \
    float part[16] = {0};                                                                                            \
    int64_t e = 0;                                                                                                   \
    for (; e + 16 <= width; e += 16) for (int u = 0; u < 16; u++) part[u] += q[e + u] * load((key)[e + u]);          \
    for (; e < width; e++) part[0] += q[e] * load((key)[e]);                                                         \
    for (int step = 8; step; step /= 2) for (int u = 0; u < step; u++) part[u] += part[u + step];                    \
    sum = part[0];                                                                                                   \
} while (0)

/* Adds q k_t to score[t] of every key that counts; `stride` is from one to the next. */
#define SCORES(type, load) do {                                                                                      \
    const type *all = (const type *)keys_at;                                                                         \
    for (int64_t t = 0; t < keys; t++) {                                                                             \
        if (score[t] == -INFINITY) continue;                                                                         \
        float dot;                                                                                                   \
        DOT(dot, all + t * x->b.strides[2], load);                                                                   \
        score[t] += dot;                                                                                             \
        last = t + 1;                                                                                                \
    }                                                                                                                \
} while (0)

/* y = sum of p_t v_t, 32 channels at a time, which stay in registers; keys whose p is below zero do not count. */
#define VALUES(type, load) do {                                                                                      \
    const type *all = (const type *)values_at;                                                                       \
    int64_t e = 0;                                                                                                   \
    for (; e + 32 <= width; e += 32) {                                                                               \
        float part[32] = {0};                                                                                        \
        for (int64_t t = 0; t < last; t++) {                                                                         \
            const type *value = all + t * x->c.strides[2] + e;                                                       \
            float p = score[t];                                                                                      \
            if (p < 0) continue;                                                                                     \
            for (int u = 0; u < 32; u++) part[u] += p * load(value[u]);                                              \
        }                                                                                                            \
        for (int u = 0; u < 32; u++) y[e + u] = part[u];                                                             \
    }                                                                                                                \
    for (; e < width; e++) {                                                                                         \
        y[e] = 0;                                                                                                    \
        for (int64_t t = 0; t < last; t++) if (!(score[t] < 0)) y[e] += score[t] * load(all[t * x->c.strides[2] + e]); \
    }                                                                                                                \
} while (0)

#define WIDER(x) from_bits((uint32_t)(x) << 16)
#define SAME(x) (x)

enum { PIECE = 256 }; /* elements at a time */

/* `n` elements in float32, `stride` apart. */
static void take(float *restrict out, const char *from, int64_t stride, int64_t n, int64_t type) {
    const float *f = (const float *)from;
    const half *h = (const half *)from;
    const int64_t *w = (const int64_t *)from;
    if (type == F32 && stride == 1) memcpy(out, f, (size_t)n * 4);
    else if (type == F32) for (int64_t e = 0; e < n; e++) out[e] = f[e * stride];
    else if (type == LONG) for (int64_t e = 0; e < n; e++) out[e] = (float)w[e * stride];
    else if (stride == 1) for (int64_t e = 0; e < n; e++) out[e] = WIDER(h[e]);
    else for (int64_t e = 0; e < n; e++) out[e] = WIDER(h[e * stride]);
}

static void give(char *to, const float *restrict x, int64_t stride, int64_t n, int64_t type) {
    if (type == F32 && stride == 1) memcpy(to, x, (size_t)n * 4);
    else if (type == F32) for (int64_t e = 0; e < n; e++) ((float *)to)[e * stride] = x[e];
    else if (type == BOOL) for (int64_t e = 0; e < n; e++) ((uint8_t *)to)[e * stride] = x[e] != 0;
    else for (int64_t e = 0; e < n; e++) ((half *)to)[e * stride] = to_bf16(x[e]);
}

#define ALL(expression) for (int64_t e = 0; e < n; e++) { float x = a[e], y = b[e]; (void)x, (void)y; o[e] = expression; } break

/* One operation on floats side by side. */
static void compute(float *restrict o, const float *restrict a, const float *restrict b, int64_t n, int64_t op) {
    switch (op) {
        case ADD: ALL(x + y); case SUB: ALL(x - y); case MUL: ALL(x * y); case DIV: ALL(x / y);
        case LE: ALL(x <= y); case LT: ALL(x < y); case GE: ALL(x >= y); case GT: ALL(x > y); case EQ: ALL(x == y); case NE: ALL(x != y);
        case NEG: ALL(-x); case RSQRT: ALL(1 / sqrtf(x)); case SQRT: ALL(sqrtf(x)); case SQUARE: ALL(x * x); case EXP: ALL(expf(x));
        case SILU: ALL(x / (1 + exponential(-x))); case SIGMOID: ALL(1 / (1 + exponential(-x)));
        case RELU: ALL(x > 0 || x != x ? x : 0); case TANH: ALL(tanhf(x)); case COS: ALL(cosf(x)); case SIN: ALL(sinf(x));
        case GELU: ALL(x * 0.5f * (1 + erff(x * 0.70710678118654752f)));
        case GELU_TANH: ALL(0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x))));
        default: ALL(x);
    }
}

static int64_t whole(int64_t a, int64_t b, int64_t op) {
    switch (op) {
        case ADD: return a + b; case SUB: return a - b; case MUL: return a * b; case AND: return a & b; case OR: return a | b;
        case LE: return a <= b; case LT: return a < b; case GE: return a >= b; case GT: return a > b;
        case EQ: return a == b; case NE: return a != b; default: return a;
    }
}

static inline int64_t whole_at(const char *x, int64_t i, int64_t type) {
    return type == LONG ? ((const int64_t *)x)[i] : ((const uint8_t *)x)[i];
}

/* Every element of an operation on integers, booleans or floats, the innermost dimension in pieces. */
static void each(const struct instruction *x) {
    const int64_t *s = x->sizes, type = x->type;
    float a[PIECE], b[PIECE], o[PIECE];
    for (int64_t i = 0; i < s[0]; i++) for (int64_t j = 0; j < s[1]; j++) for (int64_t l = 0; l < s[2]; l++) {
        char *out = place(&x->out, x->to, i, j, l);
        const char *pa = place(&x->a, type, i, j, l), *pb = place(&x->b, type, i, j, l), *pc = place(&x->c, BOOL, i, j, l);
        int64_t sa = x->a.strides[3], sb = x->b.strides[3], so = x->out.strides[3];
        if (type == BOOL || (type == LONG && (x->to == LONG || x->to == BOOL))) {
            for (int64_t e = 0; e < s[3]; e++) {
                int64_t y = whole(whole_at(pa, e * sa, type), whole_at(pb, e * sb, type), x->op);
                if (x->to == LONG) ((int64_t *)out)[e * so] = y;
                else ((uint8_t *)out)[e * so] = (uint8_t)y;
            }
            continue;
        }
        for (int64_t at = 0; at < s[3]; at += PIECE) {
            int64_t n = s[3] - at < PIECE ? s[3] - at : PIECE;
            take(a, pa + at * sa * bytes(type), sa, n, type);
            if (x->op <= WHERE) take(b, pb + at * sb * bytes(type), sb, n, type);
            if (x->op == WHERE)
                for (int64_t e = 0; e < n; e++) o[e] = ((const uint8_t *)pc)[(at + e) * x->c.strides[3]] ? a[e] : b[e];
            else compute(o, a, x->op < WHERE ? b : a, n, x->op);
            give(out + at * so * bytes(x->to), o, so, n, x->to);
        }
    }
}

/* Mean or layer norm of rows of the innermost dimension, summed in float64. */
static void over_rows(const struct instruction *x) {
    const int64_t *s = x->sizes, type = x->type;
    for (int64_t i = 0; i < s[0]; i++) for (int64_t j = 0; j < s[1]; j++) for (int64_t l = 0; l < s[2]; l++) {
        char *o = place(&x->out, type, i, j, l);
        const char *a = place(&x->a, type, i, j, l);
        int64_t sa = x->a.strides[3], so = x->out.strides[3];
        double sum = 0, squares = 0;
        for (int64_t e = 0; e < s[3]; e++) sum += get(a, e * sa, type);
        double mean = sum / (double)s[3];
        if (x->op == MEAN) { put(o, 0, type, (float)mean); continue; }
        for (int64_t e = 0; e < s[3]; e++) { double d = get(a, e * sa, type) - mean; squares += d * d; }
        float rest = (float)(1 / sqrt(squares / (double)s[3] + x->scalar)), middle = (float)mean;
        for (int64_t e = 0; e < s[3]; e++) {
            float w = x->b.data ? get(x->b.data, e, type) : 1, b = x->c.data ? get(x->c.data, e, type) : 0;
            put(o, e * so, type, (get(a, e * sa, type) - middle) * rest * w + b);
        }
    }
}

/* out [B, H, L, D] = softmax(a [B, H, L, D] b^T * scalar + mask) c, with `count` keys b and values c [B, H / k, count, D]. What the
 * mask leaves out is not read. A row without any key is zero, or NaN if there are none to begin with. */
static void attention(const struct instruction *x, int threads) {
    const int64_t *s = x->sizes, keys = x->count, width = s[3], type = x->type;
    const struct mask *m = (const struct mask *)x->how;
    int64_t rows = s[0] * s[1] * s[2];
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * keys * width > 65536)
    for (int64_t r = 0; r < rows; r++) {
        int64_t l = r % s[2], h = r / s[2] % s[1], i = r / s[2] / s[1], last = 0;
        float *score = x->scratch + r * (keys + 2 * width), *q = score + keys, *y = q + width, top = -INFINITY, sum = 0;
        const char *from = place(&x->a, type, i, h, l);
        const char *keys_at = place(&x->b, type, i, h / x->k, 0), *values_at = place(&x->c, type, i, h / x->k, 0);
        for (int64_t e = 0; e < width; e++) q[e] = get(from, e, type) * (float)x->scalar;
        for (int64_t t = 0; t < keys; t++) {
            score[t] = 0;
            if (!m) continue;
            int64_t at = i * m->strides[0] + h * m->strides[1] + l * m->strides[2] + t * m->strides[3];
            score[t] = m->type == BOOL ? (((const uint8_t *)m->data)[at] ? 0 : -INFINITY) : get(m->data, at, m->type);
        }
        if (type == F32) SCORES(float, SAME);
        else SCORES(half, WIDER);
        for (int64_t t = 0; t < last; t++) top = score[t] > top || score[t] != score[t] ? score[t] : top;
        for (int64_t t = 0; t < last; t++) {
            float p = exponential(score[t] - top);
            score[t] = score[t] == -INFINITY ? -1 : p; /* where the mask leaves it out */
        }
        for (int64_t t = 0; t < last; t++) sum += score[t] < 0 ? 0 : score[t];
        if (type == F32) VALUES(float, SAME);
        else VALUES(half, WIDER);
        char *o = place(&x->out, type, i, h, l);
        for (int64_t e = 0; e < width; e++) put(o, e, type, last ? y[e] / sum : 0);
    }
}

/* Layers that read the same `sizes[2]` rows: they are quantized once, and all threads share all output channels. */
static void linears(const struct instruction *x, int threads) {
    const struct rewrite *how = (const struct rewrite *)x->how;
    int convert = x->type != F32 || how;
    const struct groups *c = x->layers[0].c;
    int64_t m = x->sizes[2], groups = c ? c->count : 1, total = 0;
    float *scales = x->scratch + (convert ? tiled(x->k) : 0);
    int8_t *q = (int8_t *)(scales + m * (1 + groups));
    for (int64_t r = 0; r < m; r++) {
        const float *row = (const float *)x->a.data + r * x->k;
        if (convert) { load_row(x->scratch, x->a.data, r, x->k, how, (int)x->type); row = x->scratch; }
        quantize_row(q + r * x->k, scales + r * (1 + groups), row, x->k, c, (float)x->scalar);
    }
    for (int64_t i = 0; i < x->count; i++) total += x->layers[i].n;
    #pragma omp parallel num_threads(threads) if (threads > 1 && m * total * x->k > 131072)
    {
        int64_t part = 0, parts = 1, begin = 0;
        #ifdef _OPENMP
        part = omp_get_thread_num(), parts = omp_get_num_threads();
        #endif
        int64_t from = part * total / parts / ROWS * ROWS, to = (part + 1) * total / parts / ROWS * ROWS;
        if (part + 1 == parts) to = total;
        for (int64_t i = 0; i < x->count; begin += x->layers[i++].n) {
            const struct layer *y = x->layers + i;
            int64_t j = from > begin ? from - begin : 0, end = to - begin < y->n ? to - begin : y->n;
            while (j < end) {
                int64_t rows = end - j < ROWS ? 1 : ROWS;
                for (int64_t r = 0; r < m; r++)
                    token_rows(y->y + r * y->n * bytes(x->type), q + r * x->k, scales + r * (1 + groups), y->w, y->sums, y->sw,
                               y->bias, j, rows, y->n, x->k, y->c, (int)x->type);
                j += rows;
            }
        }
    }
}

/* Runs them. Returns 0, or 1 + the number of the instruction whose index points outside of its tensor. */
int64_t quantkit_run(const struct instruction *list, int64_t count, int threads) {
    for (int64_t at = 0; at < count; at++) {
        const struct instruction *x = list + at;
        const int64_t *s = x->sizes, type = x->type;
        switch (x->op) {
            case MEAN: case LAYER_NORM: over_rows(x); break;
            case INDEX_COPY: /* a [i, j, t, e] goes to out [i, j, b[t], e], which has `count` places */
                for (int64_t t = 0; t < s[2]; t++) {
                    int64_t to = ((const int64_t *)x->b.data)[t * x->b.strides[0]];
                    if (to < 0 || to >= x->count) return at + 1;
                    for (int64_t i = 0; i < s[0]; i++) for (int64_t j = 0; j < s[1]; j++) {
                        char *o = place(&x->out, type, i, j, to), *a = place(&x->a, type, i, j, t);
                        for (int64_t e = 0; e < s[3]; e++)
                            memcpy(o + e * x->out.strides[3] * bytes(type), a + e * x->a.strides[3] * bytes(type), (size_t)bytes(type));
                    }
                }
                break;
            case EMBEDDING: /* rows b[t] of a, which has `count` */
                for (int64_t t = 0; t < s[2]; t++) {
                    int64_t from = ((const int64_t *)x->b.data)[t];
                    if (from < 0 || from >= x->count) return at + 1;
                    memcpy(place(&x->out, type, 0, 0, t), place(&x->a, type, 0, 0, from), (size_t)(s[3] * bytes(type)));
                }
                break;
            case ATTENTION: attention(x, threads); break;
            case LINEARS: linears(x, threads); break;
            default: each(x);
        }
    }
    return 0;
}
