/* Dense jobs of the golden device, bit for bit as kvattic/golden/dense.py computes them, but in floating point that is
   exact here (docs/numerics.md has the windows):

   - a product of two 16-bit elements has at most 22 significant bits: exact in float, and so is its truncation;
   - sums of truncated products are integers, exact in double below 2**53;
   - a product of a weight (22 bits) and an element (11 bits) is exact in double; sums are moved to 128-bit integers
     before they could reach 2**53.

   A job for which a bound does not hold, or with a NaN, an infinity or anything that must be reported, is left to NumPy:
   its `clean` is 0 then.  No rounding ever happens here, so neither the rounding mode nor the order of sums matters;
   the compiler must not contract a product and a sum (-ffp-contract=off). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define BLOCK_LIMIT 8192.0f /* 2**53 / 2**VALUE_FRACTION: what a double sums of |weight * v| exactly */

typedef struct {
    int64_t jobs, rows, head_dim, bf16, coded; /* K and V: one byte an element, which `codes` turns into elements */
    int64_t pages, tokens, tokens_per_page, tokens_per_codeword, codeword_bytes; /* of each job */
    int64_t base_token, end_token, tree_token, scale_bits;
    int64_t score_fraction, score_masked, score_max, round_shift, window_fraction, window_bits;
    int64_t step_bits, weight_bits, weight_round_shift, weight_alignment, weight_exponents;
} Shape;

static inline float as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline double as_double(uint64_t bits) { double value; memcpy(&value, &bits, 8); return value; }

/* Elements to floats, exactly; the largest of their bit patterns without the sign. */
static uint16_t convert(const uint8_t *from, float *to, int64_t count, int bf16)
{
    uint16_t most = 0;
    int64_t at = 0;
    if (bf16) {
        for (; at < count; at++) {
            uint16_t bits;
            memcpy(&bits, from + 2 * at, 2);
            to[at] = as_float((uint32_t)bits << 16);
            bits &= 0x7fff;
            most = bits > most ? bits : most;
        }
        return most;
    }
#if defined(__F16C__) && defined(__AVX2__)
    __m256i high = _mm256_setzero_si256(), mask = _mm256_set1_epi16(0x7fff);
    for (; at + 16 <= count; at += 16) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(from + 2 * at));
        high = _mm256_max_epu16(high, _mm256_and_si256(bits, mask));
        _mm256_storeu_ps(to + at, _mm256_cvtph_ps(_mm256_castsi256_si128(bits)));
        _mm256_storeu_ps(to + at + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)));
    }
    uint16_t found[16];
    _mm256_storeu_si256((__m256i *)found, high);
    for (int i = 0; i < 16; i++)
        most = found[i] > most ? found[i] : most;
#endif
    for (; at < count; at++) { /* without subnormal floats, which a process may have switched off */
        uint16_t bits;
        memcpy(&bits, from + 2 * at, 2);
        uint32_t size = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
        float normal = as_float(size + (112u << 23));
        float small = as_float(size + (113u << 23)) - 0x1p-14f;
        float value = bits & 0x7c00 ? normal : small;
        uint32_t raw;
        memcpy(&raw, &value, 4);
        to[at] = as_float(raw | sign);
        bits &= 0x7fff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* The same of K or V as it is stored. */
static uint16_t convert_stored(const Shape *shape, const uint16_t *codes, const uint8_t *from, uint16_t *elements, float *to,
                               int64_t count)
{
    if (!shape->coded)
        return convert(from, to, count, (int)shape->bf16);
    for (int64_t at = 0; at < count; at++)
        elements[at] = codes[from[at]];
    return convert((const uint8_t *)elements, to, count, (int)shape->bf16);
}

#define INLINE static inline __attribute__((always_inline))

/* Sums of truncated products of q and a token of K, of `dim` features, a multiple of 16. */
INLINE double dot(const float *q, const float *k, int64_t dim)
{
    double sum = 0;
#if defined(__AVX2__)
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    for (int64_t c = 0; c < dim; c += 8) {
        __m256 product = _mm256_mul_ps(_mm256_loadu_ps(q + c), _mm256_loadu_ps(k + c));
        product = _mm256_round_ps(product, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
        low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(product)));
        high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(product, 1)));
    }
    low = _mm256_add_pd(low, high);
    __m128d half = _mm_add_pd(_mm256_castpd256_pd128(low), _mm256_extractf128_pd(low, 1));
    sum = _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
#else
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < dim; c++)
        sum += (double)__builtin_truncf(q[c] * k[c]);
#endif
    return sum;
}

INLINE void dots(const float *query, const float *key, double *sums, int64_t rows, int64_t stride, int64_t tokens,
                 int64_t dim)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < tokens; t++)
            sums[r * stride + t] = dot(query + r * dim, key + t * dim, dim);
}

/* Adds truncated products of weights and tokens of V. */
INLINE void add_values(const double *weights, const float *value, double *sums, int64_t rows, int64_t stride,
                       int64_t tokens, int64_t dim)
{
    for (int64_t r = 0; r < rows; r++) {
        const double *weight = weights + r * stride;
        double *to = sums + r * dim;
        double any = 0;
        for (int64_t t = 0; t < tokens; t++)
            any += weight[t];
        if (any == 0)
            continue;
#pragma omp simd
        for (int64_t c = 0; c < dim; c++) {
            double sum = to[c];
            for (int64_t t = 0; t < tokens; t++)
                sum += __builtin_trunc(weight[t] * (double)value[t * dim + c]);
            to[c] = sum;
        }
    }
}

/* The usual codewords with constants, so that the loops are unrolled: 512 bytes of head_dim 64 and 128. */
#define FOR_SIZE(tokens, dim, call)         \
    if ((tokens) == 4 && (dim) == 64)       \
        call(4, 64);                        \
    else if ((tokens) == 2 && (dim) == 128) \
        call(2, 128);                       \
    else if ((tokens) == 4 && (dim) == 128) \
        call(4, 128);                       \
    else                                    \
        call(tokens, dim);

static inline int bit_length(unsigned __int128 value)
{
    uint64_t high = (uint64_t)(value >> 64), low = (uint64_t)value;
    return high ? 128 - __builtin_clzll(high) : low ? 64 - __builtin_clzll(low) : 0;
}

/* dense._quotient: fp32 bits nearest to numerator / denominator, ties to even. */
static uint32_t divide(__int128 numerator, uint64_t denominator)
{
    if (numerator == 0 || denominator == 0)
        return 0;
    uint32_t sign = numerator < 0 ? 0x80000000u : 0;
    unsigned __int128 size = numerator < 0 ? -(unsigned __int128)numerator : (unsigned __int128)numerator;
    unsigned __int128 below = denominator, quotient;
    int shift = 26 - bit_length(size) + bit_length(below);
    if (shift > 0)
        size <<= shift;
    else
        below <<= -shift;
    if ((uint64_t)(size >> 64) == 0 && (uint64_t)(below >> 64) == 0)
        quotient = (uint64_t)size / (uint64_t)below;
    else
        quotient = size / below;
    uint64_t bits = (uint64_t)quotient << 1 | (size != quotient * below);
    shift += 1;
    int drop = bit_length(bits) - 24;
    uint64_t kept = bits >> drop, half = (uint64_t)1 << (drop - 1), dropped = bits & (((uint64_t)1 << drop) - 1);
    kept += dropped > half || (dropped == half && (kept & 1));
    return sign | (uint32_t)(((int64_t)(drop - shift + 23 + 126) << 23) + (int64_t)kept);
}

typedef struct {
    float *query;      /* rows x head_dim, times the scale's power of two: products have steps of 1 */
    float *block;      /* a codeword */
    uint16_t *elements; /* likewise, where K and V are stored otherwise */
    double *sums;      /* rows x tokens: of products, then weights */
    int64_t *scores;   /* tokens */
    double *values;    /* rows x head_dim, of a few tokens */
    __int128 *wide;    /* rows x head_dim */
} Space;

/* Tokens of a page, a codeword at a time: `call` gets the first token, how many, and their floats. */
#define FOR_CODEWORDS(shape, places, space, most, body)                                                              \
    for (int64_t page = 0, first = 0; first < (shape)->tokens; page++) {                                              \
        const uint8_t *from = (const uint8_t *)(intptr_t)(places)[page];                                              \
        int64_t stop = first + (shape)->tokens_per_page;                                                              \
        stop = stop < (shape)->tokens ? stop : (shape)->tokens;                                                       \
        for (; first < stop; first += (shape)->tokens_per_codeword, from += (shape)->codeword_bytes) {                \
            int64_t count = stop - first;                                                                             \
            count = count < (shape)->tokens_per_codeword ? count : (shape)->tokens_per_codeword;                      \
            uint16_t found = convert_stored(shape, codes, from, (space)->elements, (space)->block,                    \
                                            count * (shape)->head_dim);                                               \
            most = found > most ? found : most;                                                                       \
            body                                                                                                      \
        }                                                                                                             \
        first = stop;                                                                                                 \
    }

static float magnitude(uint16_t bits, int bf16)
{
    uint8_t raw[2] = {(uint8_t)bits, (uint8_t)(bits >> 8)};
    float value;
    convert(raw, &value, 1, bf16);
    return value;
}

/* q times the power of two of the score window; the largest magnitude of each row; 0: not exact. */
static int scale_query(const Shape *shape, const uint16_t *query, Space *space, float *largest)
{
    int64_t power = shape->window_fraction + (shape->scale_bits >> 23) - 127;
    int64_t count = shape->rows * shape->head_dim;
    if (power < -100 || power > 100)
        return 0;
    float factor = as_float((uint32_t)(power + 127) << 23), most = 0;
    convert((const uint8_t *)query, space->query, count, (int)shape->bf16);
    for (int64_t i = 0; i < count; i++) {
        float scaled = space->query[i] * factor, size = __builtin_fabsf(scaled);
        if ((query[i] & 0x7fff) && !(size >= 0x1p-126f && size < 0x1p125f &&
                                     __builtin_fabsf(space->query[i]) >= 0x1p-126f))
            return 0;
        space->query[i] = scaled;
        most = size > most ? size : most;
    }
    *largest = most;
    return 1;
}

/* Scores of a row's attended tokens, and their maximum; 0: one is out of range. */
static int round_row(const Shape *shape, const double *sums, int64_t start, int64_t end, uint64_t tree, int small,
                     Space *space, int64_t *maximum)
{
    int64_t significand = 0x800000 | (shape->scale_bits & 0x7fffff), most = shape->score_masked;
    int64_t half = (int64_t)1 << (shape->round_shift - 1), limit = (int64_t)1 << shape->window_bits;
    int64_t *scores = space->scores;
    int good = 1;
    end = end < shape->end_token ? end : shape->end_token;
    int64_t low = start - shape->base_token, high = end - shape->base_token;
    low = low < 0 ? 0 : low > shape->tokens ? shape->tokens : low;
    high = high > shape->tokens ? shape->tokens : high < low ? low : high;
    for (int64_t t = 0; t < low; t++)
        scores[t] = shape->score_masked;
    for (int64_t t = high; t < shape->tokens; t++)
        scores[t] = shape->score_masked;
    if (small)
        for (int64_t t = low; t < high; t++)
            scores[t] = ((int64_t)sums[t] * significand + half) >> shape->round_shift;
    else
        for (int64_t t = low; t < high; t++) {
            int64_t sum = (int64_t)sums[t];
            scores[t] = (int64_t)(((__int128)sum * significand + half) >> shape->round_shift);
            good &= sum < limit && sum >= -limit && scores[t] > shape->score_masked && scores[t] <= shape->score_max;
        }
    int64_t drafts = shape->tree_token - shape->base_token;
    for (int64_t t = drafts < low ? low : drafts; t < high; t++)
        if (t - drafts >= 32 || !(tree >> (t - drafts) & 1))
            scores[t] = shape->score_masked;
    for (int64_t t = low; t < high; t++)
        most = scores[t] > most ? scores[t] : most;
    *maximum = most;
    return good;
}

/* Weights of a row times 2**VALUE_FRACTION, and their sum, each truncated.  The table has the constant coefficients of
   all segments, then the linear and the quadratic ones. */
static int64_t weigh(const Shape *shape, const int64_t *scores, int64_t maximum, const int64_t *table, double *weights)
{
    int64_t total = 0, step_mask = ((int64_t)1 << shape->step_bits) - 1;
    int64_t segments = ((int64_t)1 << (shape->score_fraction - shape->step_bits)) - 1;
    int64_t top = ((int64_t)1 << shape->weight_bits) - 1, half = (int64_t)1 << (shape->weight_round_shift - 1);
    int64_t masked = shape->score_masked, fraction = shape->score_fraction, step_bits = shape->step_bits;
    int64_t round_shift = shape->weight_round_shift, exponents = shape->weight_exponents;
    int64_t alignment = shape->weight_alignment, tokens = shape->tokens;
    const int64_t *first = table + segments + 1, *second = first + segments + 1;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t below = scores[t] - maximum, exponent = -(below >> fraction), step = below & step_mask;
        int64_t segment = below >> step_bits & segments;
        int64_t significand = ((second[segment] * step >> step_bits) + first[segment]) * step >> step_bits;
        significand = (significand + table[segment] + half) >> round_shift;
        significand = significand < top ? significand : top;
        int64_t used = -(int64_t)((exponent < exponents) & (scores[t] != masked));
        significand &= used;
        exponent &= used;
        total += significand << alignment >> exponent;
        weights[t] = (double)significand * as_double((uint64_t)(1023 + alignment - exponent) << 52);
    }
    return total;
}

static void flush(const Shape *shape, Space *space)
{
    for (int64_t i = 0; i < shape->rows * shape->head_dim; i++) {
        space->wide[i] += (int64_t)space->values[i];
        space->values[i] = 0;
    }
}

static int attend(const Shape *shape, const int64_t *keys, const int64_t *values, const uint16_t *query,
                  const int64_t *start, const int64_t *end, const int64_t *tree, const int64_t *table,
                  const uint16_t *codes, Space *space, uint32_t *output, int64_t *maximum, int64_t *denominator)
{
    int bf16 = (int)shape->bf16;
    int64_t rows = shape->rows, dim = shape->head_dim, tokens = shape->tokens;
    uint16_t special = bf16 ? 0x7f80 : 0x7c00, most = 0;
    float largest;
    if (!scale_query(shape, query, space, &largest))
        return 0;
#define DOTS(count, dim) dots(space->query, space->block, space->sums + first, rows, tokens, count, dim)
    FOR_CODEWORDS(shape, keys, space, most, FOR_SIZE(count, dim, DOTS))
    if (most >= special)
        return 0;
    double bound = (double)largest * magnitude(most, bf16);
    if (!(bound < as_double((uint64_t)(1023 + shape->window_bits) << 52) && bound * (double)dim < 0x1p53))
        return 0;
    int small = bound * (double)dim < 0x1p38; /* scores far inside of their range, and 64 bits hold all products */
    for (int64_t r = 0; r < rows; r++) {
        if (!round_row(shape, space->sums + r * tokens, start[r], end[r], (uint64_t)tree[r], small, space, maximum + r))
            return 0;
        denominator[r] = weigh(shape, space->scores, maximum[r], table, space->sums + r * tokens);
    }
    most = 0;
    float sum = 0;
    memset(space->values, 0, (size_t)(rows * dim) * sizeof *space->values);
    memset(space->wide, 0, (size_t)(rows * dim) * sizeof *space->wide);
#define ADD(count, dim) add_values(space->sums + first, space->block, space->values, rows, tokens, count, dim)
    FOR_CODEWORDS(shape, values, space, most, {
        if (found >= special)
            return 0;
        float here = magnitude(found, bf16) * (float)count;
        if (here >= BLOCK_LIMIT)
            return 0;
        if (sum + here >= BLOCK_LIMIT) {
            flush(shape, space);
            sum = 0;
        }
        sum += here;
        FOR_SIZE(count, dim, ADD)
    })
    flush(shape, space);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < dim; c++)
            output[r * dim + c] = divide(space->wide[r * dim + c], (uint64_t)denominator[r]);
    return 1;
}

/* Jobs of one shape.  Addresses of pages, queries and windows lie job after job, and so do the results.
   Returns 0 if there is no memory. */
int kvattic_dense(const Shape *shape, const int64_t *keys, const int64_t *values, const uint16_t *query,
                  const int64_t *start, const int64_t *end, const int64_t *tree, const int64_t *table,
                  const uint16_t *codes, uint32_t *output, int64_t *maximum, int64_t *denominator, uint8_t *clean)
{
    int64_t outputs = shape->rows * shape->head_dim;
    Space space = {
        malloc((size_t)outputs * sizeof(float)),
        malloc((size_t)(shape->tokens_per_codeword * shape->head_dim) * sizeof(float)),
        malloc((size_t)(shape->tokens_per_codeword * shape->head_dim) * sizeof(uint16_t)),
        malloc((size_t)(shape->rows * shape->tokens) * sizeof(double)),
        malloc((size_t)shape->tokens * sizeof(int64_t)),
        malloc((size_t)outputs * sizeof(double)),
        malloc((size_t)outputs * sizeof(__int128)),
    };
    int ready = space.query && space.block && space.elements && space.sums && space.scores && space.values && space.wide;
    for (int64_t job = 0; ready && job < shape->jobs; job++)
        clean[job] = (uint8_t)attend(
            shape, keys + job * shape->pages, values + job * shape->pages, query + job * outputs,
            start + job * shape->rows, end + job * shape->rows, tree + job * shape->rows, table, codes, &space,
            output + job * outputs, maximum + job * shape->rows, denominator + job * shape->rows);
    free(space.query);
    free(space.block);
    free(space.elements);
    free(space.sums);
    free(space.scores);
    free(space.values);
    free(space.wide);
    return ready;
}
