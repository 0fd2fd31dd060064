/* Sixteen numbers side by side: one register of AVX-512, two of AVX2. The loops are written once, and compiled for what the machine has.
 *
 * n counts the numbers that exist: those beyond are read as zero and not written; 16 or more means all.
 */
#ifndef OPTKIT_LANES_H
#define OPTKIT_LANES_H
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { LANES = 16 };

#if defined(__AVX512F__)

typedef __m512 vec;
typedef __m512i ivec;

INLINE __mmask16 first(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

INLINE vec v_set(float x) { return _mm512_set1_ps(x); }
INLINE vec v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec v_load_first(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
INLINE void v_store(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE void v_store_first(float *p, int64_t n, vec v) { _mm512_mask_storeu_ps(p, first(n), v); }
INLINE vec v_first(vec v, int64_t n) { return _mm512_maskz_mov_ps(first(n), v); }
INLINE vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec v_abs(vec a) { return _mm512_abs_ps(a); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }   /* a b + c */
INLINE vec v_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
INLINE vec v_round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_power_of_two(vec p, vec n) { return _mm512_scalef_ps(p, n); } /* p 2^n */
INLINE float v_sum(vec a) { return _mm512_reduce_add_ps(a); }
INLINE float v_largest(vec a) { return _mm512_reduce_max_ps(a); }
INLINE vec v_from_int8(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
INLINE vec v_from_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
INLINE void v_to_int8(int8_t *p, vec v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))); }
INLINE void i_to_int16(int16_t *p, ivec a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a)); }
INLINE vec v_from_float16(__m256i bits) { return _mm512_cvtph_ps(bits); }
INLINE vec v_from_bfloat16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

INLINE __m256i v_to_bfloat16(vec v)
{
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), 0x7fc0));
}

INLINE ivec i_zero(void) { return _mm512_setzero_si512(); }
INLINE ivec i_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE ivec i_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
INLINE ivec i_sub(ivec a, ivec b) { return _mm512_sub_epi32(a, b); }
INLINE ivec i_of(vec a) { return _mm512_cvtps_epi32(a); }
INLINE vec i_float(ivec a) { return _mm512_cvtepi32_ps(a); }
INLINE ivec i_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
/* Nibble i of both halves of each dword, as 16-bit numbers. */
INLINE ivec i_nibbles(ivec dwords, const int i) { return _mm512_and_si512(i ? _mm512_srli_epi32(dwords, 4 * i) : dwords, _mm512_set1_epi32(0x000f000f)); }
#if defined(__AVX512VNNI__)
INLINE ivec i_dot_pairs(ivec sum, ivec a, ivec b) { return _mm512_dpwssd_epi32(sum, a, b); }
#else
INLINE ivec i_dot_pairs(ivec sum, ivec a, ivec b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif
/* Keep in a register what the compiler would load again and again. */
INLINE ivec i_held(ivec a)
{
    __asm__("" : "+v"(a));
    return a;
}
/* 1 + q / 16 for the four bits q from `at` on of each dword: they become the highest of the fraction of a float between 1 and 2. */
INLINE vec v_nibble(ivec dwords, const int at)
{
    ivec moved = at < 19 ? _mm512_slli_epi32(dwords, 19 - at) : _mm512_srli_epi32(dwords, at - 19);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(0x780000), _mm512_set1_epi32(0x3f800000), 0xea)); /* a & b | c */
}

#else

typedef struct {
    __m256 low, high;
} vec;
typedef struct {
    __m256i low, high;
} ivec;

#define EACH(operation, ...) ((vec){operation((a).low, ##__VA_ARGS__), operation((a).high, ##__VA_ARGS__)})
#define PAIR(operation) ((vec){operation(a.low, b.low), operation(a.high, b.high)})
#define TRIPLE(operation) ((vec){operation(a.low, b.low, c.low), operation(a.high, b.high, c.high)})

INLINE __m256i lanes_below(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n < 0 ? 0 : n > 8 ? 8 : n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

INLINE vec v_set(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vec v_load(const float *p) { return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE vec v_load_first(const float *p, int64_t n) { return (vec){_mm256_maskload_ps(p, lanes_below(n)), _mm256_maskload_ps(p + 8, lanes_below(n - 8))}; }
INLINE void v_store(float *p, vec v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
INLINE void v_store_first(float *p, int64_t n, vec v) { _mm256_maskstore_ps(p, lanes_below(n), v.low), _mm256_maskstore_ps(p + 8, lanes_below(n - 8), v.high); }
INLINE vec v_first(vec v, int64_t n)
{
    return (vec){_mm256_and_ps(v.low, _mm256_castsi256_ps(lanes_below(n))), _mm256_and_ps(v.high, _mm256_castsi256_ps(lanes_below(n - 8)))};
}
INLINE vec v_add(vec a, vec b) { return PAIR(_mm256_add_ps); }
INLINE vec v_sub(vec a, vec b) { return PAIR(_mm256_sub_ps); }
INLINE vec v_mul(vec a, vec b) { return PAIR(_mm256_mul_ps); }
INLINE vec v_div(vec a, vec b) { return PAIR(_mm256_div_ps); }
INLINE vec v_max(vec a, vec b) { return PAIR(_mm256_max_ps); }
INLINE vec v_min(vec a, vec b) { return PAIR(_mm256_min_ps); }
INLINE vec v_abs(vec b)
{
    vec a = v_set(-0.0f);
    return PAIR(_mm256_andnot_ps);
}
INLINE vec v_fma(vec a, vec b, vec c) { return TRIPLE(_mm256_fmadd_ps); }
INLINE vec v_fnma(vec a, vec b, vec c) { return TRIPLE(_mm256_fnmadd_ps); }
INLINE vec v_round(vec a) { return EACH(_mm256_round_ps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE __m256 power8(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
INLINE vec v_power_of_two(vec p, vec n) { return (vec){_mm256_mul_ps(p.low, power8(n.low)), _mm256_mul_ps(p.high, power8(n.high))}; }
INLINE float v_sum(vec a)
{
    __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float v_largest(vec a)
{
    __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE __m256 eight_bytes(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
INLINE vec v_from_int8(const uint8_t *p) { return (vec){eight_bytes(p), eight_bytes(p + 8)}; }
INLINE vec v_from_bytes(__m128i bytes)
{
    return (vec){_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
INLINE void v_to_int8(int8_t *p, vec v)
{
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE vec v_from_float16(__m256i bits) { return (vec){_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))}; }
INLINE __m256 eight_halves(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
INLINE vec v_from_bfloat16(__m256i bits) { return (vec){eight_halves(_mm256_castsi256_si128(bits)), eight_halves(_mm256_extracti128_si256(bits, 1))}; }
INLINE __m256i rounded8(__m256 v)
{
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLINE __m256i v_to_bfloat16(vec v) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded8(v.low), rounded8(v.high)), 0xd8); }

INLINE ivec i_zero(void) { return (ivec){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE ivec i_load(const uint8_t *p) { return (ivec){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))}; }
INLINE ivec i_add(ivec a, ivec b) { return (ivec){_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
INLINE ivec i_sub(ivec a, ivec b) { return (ivec){_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
INLINE ivec i_of(vec a) { return (ivec){_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
INLINE vec i_float(ivec a) { return (vec){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE void i_to_int16(int16_t *p, ivec a) { _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8)); }
INLINE ivec i_pair(int32_t pair) { return (ivec){_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)}; }
INLINE __m256i nibbles8(__m256i dwords, const int i) { return _mm256_and_si256(i ? _mm256_srli_epi32(dwords, 4 * i) : dwords, _mm256_set1_epi32(0x000f000f)); }
INLINE ivec i_nibbles(ivec dwords, const int i) { return (ivec){nibbles8(dwords.low, i), nibbles8(dwords.high, i)}; }
INLINE ivec i_dot_pairs(ivec sum, ivec a, ivec b) { return i_add(sum, (ivec){_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)}); }
INLINE ivec i_held(ivec a) { return a; }

#endif

INLINE vec v_zero(void) { return v_set(0); }

/* Sixteen numbers of 16 bits in one register; those beyond n are zero. */
INLINE __m256i halves(const uint16_t *p, int64_t n)
{
#if defined(__AVX512F__)
    return _mm256_maskz_loadu_epi16(first(n), p);
#else
    uint16_t whole[LANES] = {0};
    if (n >= LANES)
        return _mm256_loadu_si256((const __m256i *)p);
    if (n > 0) memcpy(whole, p, (size_t)n * sizeof *p);
    return _mm256_loadu_si256((const __m256i *)whole);
#endif
}

/* Number `at` and those after it of an array of bfloat16 (half) or float32. */
INLINE vec load(const void *from, int64_t at, int half, int64_t n)
{
    return half ? v_from_bfloat16(halves((const uint16_t *)from + at, n)) : v_load_first((const float *)from + at, n);
}

INLINE void store(void *to, int64_t at, int half, int64_t n, vec value)
{
    if (!half) {
        v_store_first((float *)to + at, n, value);
        return;
    }
    uint16_t whole[LANES];
    _mm256_storeu_si256((__m256i *)whole, v_to_bfloat16(value));
    memcpy((uint16_t *)to + at, whole, (size_t)(n >= LANES ? LANES : n) * sizeof *whole);
}

/* Sums of four products a dword: 16 rows of weights (four int8 side by side) by four int8 of x, which `quad` holds as this machine wants them. */
#if defined(__AVX512VNNI__)
typedef uint32_t quad; /* x + 128 as four unsigned bytes: the sum is too large by 128 times the sum of the weights */
typedef ivec quads;
enum { QUAD_OFFSET = 128 };
INLINE quad quad_of(const int8_t *x)
{
    uint32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return bytes ^ 0x80808080u;
}
INLINE quads i_quads(const uint8_t *p) { return i_load(p); }
INLINE ivec i_dot(ivec sum, quad x, quads w) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32((int)x), w); }
#else
typedef struct {
    uint32_t even, odd; /* x0 x2 and x1 x3 as int16 */
} quad;
typedef struct {
    ivec even, odd;
} quads;
enum { QUAD_OFFSET = 0 };
INLINE quad quad_of(const int8_t *x)
{
    return (quad){(uint16_t)x[0] | (uint32_t)(uint16_t)x[2] << 16, (uint16_t)x[1] | (uint32_t)(uint16_t)x[3] << 16};
}
#if defined(__AVX512F__)
INLINE quads i_quads(const uint8_t *p)
{
    ivec w = i_load(p);
    return (quads){_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
}
INLINE ivec i_dot(ivec sum, quad x, quads w)
{
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.even, _mm512_set1_epi32((int)x.even)));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(w.odd, _mm512_set1_epi32((int)x.odd)));
}
#else
INLINE __m256i low_bytes(__m256i w) { return _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8); }
INLINE quads i_quads(const uint8_t *p)
{
    ivec w = i_load(p);
    return (quads){{low_bytes(w.low), low_bytes(w.high)}, {_mm256_srai_epi16(w.low, 8), _mm256_srai_epi16(w.high, 8)}};
}
INLINE __m256i dot8(__m256i sum, quad x, __m256i even, __m256i odd)
{
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_set1_epi32((int)x.even)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_set1_epi32((int)x.odd)));
}
INLINE ivec i_dot(ivec sum, quad x, quads w) { return (ivec){dot8(sum.low, x, w.even.low, w.odd.low), dot8(sum.high, x, w.even.high, w.odd.high)}; }
#endif
#endif

#endif
