// Kernels for compressed weights on x86: AVX-512, AVX2 or plain C++, chosen by the compiler's flags.
//
// A matrix [N, K] is cut into tiles of 16 rows, whose values lie side by side, one 32-bit lane each;
// `interleave.py` defines the bytes. A step is 16 inputs of a tile (2 for a bitmask):
//
//   2:4      16 x 8 codes, then 16 x uint16 of positions, two bits each: two for four inputs
//   dense    16 x 16 codes
//   bitmask  uint32 of which of 16 rows x 2 inputs stay; their codes, packed, in a stream of its own
//
// Codes of 4 and 8 bits are two's complement, of 16 bfloat16, of 32 float32. Scales are bfloat16
// [tiles, groups, 16]. Nothing here knows torch.
#ifndef SLIMFX_LINEAR_H
#define SLIMFX_LINEAR_H
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace slimfx {

enum Where { DENSE, TWO_FOUR, BITMASK };
constexpr int LANES = 16;
constexpr int WIDTH = 2 * LANES;  // columns of y that one thread makes at a time

// ---- sixteen lanes -------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__)

constexpr int PAIR = 2;      // tiles that one prefill block takes together
constexpr int BLOCK_ROWS = 8;  // rows of x in a prefill block

struct Floats { __m512 v; };
struct Words { __m512i v; };

static inline Floats zero() { return {_mm512_setzero_ps()}; }
static inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
static inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Words load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Words load_halves(const uint8_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))};
}
template <int n> static inline Words right(Words a) { return {_mm512_srli_epi32(a.v, n)}; }
static inline Floats as_bfloat16(Words a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
static inline Floats as_float32(Words a) { return {_mm512_castsi512_ps(a.v)}; }
static inline Floats as_high_bfloat16(Words a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((int)0xffff0000)))};
}
// nibble j of every lane, as a number from -8 to 7
template <int j> static inline Floats nibble(Words a) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(a.v, 4 * j), table)};
}
template <int j> static inline Floats byte(Words a) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a.v, 24 - 8 * j), 24))};
}
// x[p] for the 2-bit p at the bottom of every lane
static inline Floats pick(const float* x, Words p) {
  return {_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), p.v)};
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int PAIR = 1;
constexpr int BLOCK_ROWS = 6;

struct Floats { __m256 v[2]; };
struct Words { __m256i v[2]; };

static inline Floats zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline Floats all(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
static inline Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
static inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
static inline Floats add(Floats a, Floats b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
static inline Floats mul(Floats a, Floats b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
static inline Floats fma(Floats a, Floats b, Floats c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
static inline Words load_words(const uint8_t* p) {
  return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
}
static inline Words load_halves(const uint8_t* p) {
  return {{_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
           _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 16)))}};
}
template <int n> static inline Words right(Words a) {
  return {{_mm256_srli_epi32(a.v[0], n), _mm256_srli_epi32(a.v[1], n)}};
}
static inline Floats as_bfloat16(Words a) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a.v[0], 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(a.v[1], 16))}};
}
static inline Floats as_float32(Words a) {
  return {{_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}};
}
static inline Floats as_high_bfloat16(Words a) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return {{_mm256_castsi256_ps(_mm256_and_si256(a.v[0], high)),
           _mm256_castsi256_ps(_mm256_and_si256(a.v[1], high))}};
}
template <int drop, int n> static inline Floats signed_bits(Words a) {
  return {{_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a.v[0], drop), n)),
           _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a.v[1], drop), n))}};
}
template <int j> static inline Floats nibble(Words a) { return signed_bits<28 - 4 * j, 28>(a); }
template <int j> static inline Floats byte(Words a) { return signed_bits<24 - 8 * j, 24>(a); }
static inline Floats pick(const float* x, Words p) {
  const __m256 quad = _mm256_broadcast_ps((const __m128*)x);
  return {{_mm256_permutevar_ps(quad, p.v[0]), _mm256_permutevar_ps(quad, p.v[1])}};
}

#else

constexpr int PAIR = 1;
constexpr int BLOCK_ROWS = 4;

struct Floats { float v[LANES]; };
struct Words { uint32_t v[LANES]; };

#define SLIMFX_EACH for (int i = 0; i < LANES; ++i)
static inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline Floats all(float x) { Floats r; SLIMFX_EACH r.v[i] = x; return r; }
static inline Floats zero() { return all(0); }
static inline Floats load(const float* p) { Floats r; SLIMFX_EACH r.v[i] = p[i]; return r; }
static inline void store(float* p, Floats a) { SLIMFX_EACH p[i] = a.v[i]; }
static inline Floats add(Floats a, Floats b) { SLIMFX_EACH a.v[i] += b.v[i]; return a; }
static inline Floats mul(Floats a, Floats b) { SLIMFX_EACH a.v[i] *= b.v[i]; return a; }
static inline Floats fma(Floats a, Floats b, Floats c) {
  SLIMFX_EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
static inline Words load_words(const uint8_t* p) { Words r; std::memcpy(r.v, p, 64); return r; }
static inline Words load_halves(const uint8_t* p) {
  uint16_t h[LANES];
  std::memcpy(h, p, 32);
  Words r;
  SLIMFX_EACH r.v[i] = h[i];
  return r;
}
template <int n> static inline Words right(Words a) { SLIMFX_EACH a.v[i] >>= n; return a; }
static inline Floats as_bfloat16(Words a) {
  Floats r;
  SLIMFX_EACH r.v[i] = from_bits(a.v[i] << 16);
  return r;
}
static inline Floats as_float32(Words a) {
  Floats r;
  SLIMFX_EACH r.v[i] = from_bits(a.v[i]);
  return r;
}
static inline Floats as_high_bfloat16(Words a) {
  Floats r;
  SLIMFX_EACH r.v[i] = from_bits(a.v[i] & 0xffff0000u);
  return r;
}
template <int j> static inline Floats nibble(Words a) {
  Floats r;
  SLIMFX_EACH r.v[i] = (float)((int32_t)(a.v[i] << (28 - 4 * j)) >> 28);
  return r;
}
template <int j> static inline Floats byte(Words a) {
  Floats r;
  SLIMFX_EACH r.v[i] = (float)((int32_t)(a.v[i] << (24 - 8 * j)) >> 24);
  return r;
}
static inline Floats pick(const float* x, Words p) {
  Floats r;
  SLIMFX_EACH r.v[i] = x[p.v[i] & 3];
  return r;
}
#undef SLIMFX_EACH

#endif

static inline Floats load_bfloat16(const uint16_t* p) { return as_bfloat16(load_halves((const uint8_t*)p)); }

// ---- one step of a tile --------------------------------------------------------------------

// value j of every lane, of those packed as words of `BITS`-bit codes at p
template <int BITS, int j> static inline Floats value(const uint8_t* p) {
  constexpr int a_word = 32 / BITS;
  const Words words = load_words(p + 64 * (j / a_word));
  if constexpr (BITS == 4) return nibble<2 * (j % 4) + j % 8 / 4>(words);
  else if constexpr (BITS == 8) return byte<j % a_word>(words);
  else if constexpr (BITS == 32) return as_float32(words);
  else if constexpr (j % a_word == 0) return as_bfloat16(words);
  else return as_high_bfloat16(words);
}

// calls f with 0, 1, ..., n - 1 as compile-time numbers
template <int n, int i = 0, class F> static inline void unroll(F&& f) {
  if constexpr (i < n) {
    f(std::integral_constant<int, i>{});
    unroll<n, i + 1>(f);
  }
}

// Reads the weights of a tile from front to back. `step` adds their products with INPUTS inputs of
// MB rows of x to the sums, `expand` writes them as numbers instead, [INPUTS][LANES], rows `ld` apart.
template <Where WHERE, int BITS> struct Reader {
  static constexpr int INPUTS = 16;
  static constexpr int64_t VALUES = (WHERE == TWO_FOUR ? 8 : 16) * LANES * BITS / 8;
  static constexpr int64_t BYTES = VALUES + (WHERE == TWO_FOUR ? 2 * LANES : 0);
  const uint8_t* p;
  Reader(const uint8_t* tile, int64_t) : p(tile) {}

  template <int MB, int A> inline void step(const float* x, int64_t ldx, Floats (&sum)[MB][A]) {
    if constexpr (WHERE == TWO_FOUR) {
      const Words at = load_halves(p + VALUES);
      unroll<8>([&](auto j) {
        const Floats w = value<BITS, j>(p);
        const Words lane = right<2 * j>(at);
        for (int m = 0; m < MB; ++m)
          sum[m][j % A] = fma(w, pick(x + m * ldx + 4 * (j / 2), lane), sum[m][j % A]);
      });
    } else {
      unroll<16>([&](auto j) {
        const Floats w = value<BITS, j>(p);
        for (int m = 0; m < MB; ++m) sum[m][j % A] = fma(w, all(x[m * ldx + j]), sum[m][j % A]);
      });
    }
    p += BYTES;
  }

  inline void expand(float* panel, int64_t ld, Floats scale) {
    if constexpr (WHERE == TWO_FOUR) {
      alignas(64) static constexpr float unit[4][4] = {
          {1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}};
      const Words at = load_halves(p + VALUES);
      unroll<4>([&](auto g) {
        const Floats first = mul(value<BITS, 2 * g>(p), scale);
        const Floats second = mul(value<BITS, 2 * g + 1>(p), scale);
        for (int i = 0; i < 4; ++i) {
          const Floats a = pick(unit[i], right<4 * g>(at)), b = pick(unit[i], right<4 * g + 2>(at));
          store(panel + (4 * g + i) * ld, fma(first, a, mul(second, b)));
        }
      });
    } else {
      unroll<16>([&](auto j) { store(panel + j * ld, mul(value<BITS, j>(p), scale)); });
    }
    p += BYTES;
  }
};

// A bitmask has its masks first, uint32 [K / 2], then the values that stay in the order of the bits.
template <int BITS> struct Reader<BITMASK, BITS> {
  static constexpr int INPUTS = 2;
  const uint8_t* mask;
  const uint8_t* p;
  Reader(const uint8_t* tile, int64_t K) : mask(tile), p(tile + 2 * K) {}

  inline void next(Floats (&w)[2]) {
    uint32_t stays;
    std::memcpy(&stays, mask, 4);
    mask += 4;
    const int count = __builtin_popcount(stays);
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (BITS < 16) {
      __m256i codes;
      if constexpr (BITS == 4) {
        const __m128i low = _mm_set1_epi8(15), both = _mm_loadu_si128((const __m128i*)p);
        const __m128i even = _mm_and_si128(both, low), odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
        codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        const __m256i eight = _mm256_set1_epi8(8);  // extends the sign of the nibble
        codes = _mm256_sub_epi8(_mm256_xor_si256(codes, eight), eight);
      } else {
        codes = _mm256_loadu_si256((const __m256i*)p);
      }
      codes = _mm256_maskz_expand_epi8(stays, codes);
      w[0] = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)))};
      w[1] = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)))};
    } else {
      const __m512i all32 = _mm512_maskz_expand_epi16(stays, _mm512_loadu_si512(p));
      w[0] = as_bfloat16({_mm512_cvtepu16_epi32(_mm512_castsi512_si256(all32))});
      w[1] = as_bfloat16({_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(all32, 1))});
    }
#else
    alignas(64) float dense[2][LANES] = {};
    int i = 0;
    for (uint32_t left = stays; left; left &= left - 1, ++i) {
      const int bit = __builtin_ctz(left);
      dense[bit / LANES][bit % LANES] = code(i);
    }
    w[0] = load(dense[0]);
    w[1] = load(dense[1]);
#endif
    p += (count * BITS + 7) / 8;
  }

  inline float code(int i) const {
    if constexpr (BITS == 4) {
      const int c = (p[i / 2] >> (4 * (i % 2))) & 15;
      return (float)((c ^ 8) - 8);
    } else if constexpr (BITS == 8) {
      return (float)(int8_t)p[i];
    } else {
      uint16_t half;
      std::memcpy(&half, p + 2 * i, 2);
      const uint32_t bits = (uint32_t)half << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
  }

  template <int MB, int A> inline void step(const float* x, int64_t ldx, Floats (&sum)[MB][A]) {
    Floats w[2];
    next(w);
    for (int m = 0; m < MB; ++m) {
      sum[m][0] = fma(w[0], all(x[m * ldx]), sum[m][0]);
      sum[m][A - 1] = fma(w[1], all(x[m * ldx + 1]), sum[m][A - 1]);
    }
  }

  inline void expand(float* panel, int64_t ld, Floats scale) {
    Floats w[2];
    next(w);
    store(panel, mul(w[0], scale));
    store(panel + ld, mul(w[1], scale));
  }
};

// ---- a tile times x ------------------------------------------------------------------------

// K a multiple of 16, groups of a multiple of 16; K = group where there is one scale a row.
struct Matrix {
  const uint8_t* data;
  const uint16_t* scale;
  int64_t K, group, tile_bytes;
};

// y[m][0..16) (+)= the tile times x[m], for MB rows
template <Where WHERE, int BITS, int MB>
static inline void rows(const Matrix& w, int64_t tile, const float* x, int64_t ldx, float* y,
                        int64_t ldy, bool accumulate) {
  constexpr int A = MB >= 4 ? 1 : 4 / MB;  // independent sums, for the latency of fma
  Reader<WHERE, BITS> reader(w.data + tile * w.tile_bytes, w.K);
  const uint16_t* scale = w.scale + tile * ((w.K + w.group - 1) / w.group) * LANES;
  Floats total[MB];
  for (int m = 0; m < MB; ++m) total[m] = accumulate ? load(y + m * ldy) : zero();
  for (int64_t start = 0; start < w.K; start += w.group, scale += LANES) {
    Floats sum[MB][A];
    for (int m = 0; m < MB; ++m)
      for (int a = 0; a < A; ++a) sum[m][a] = zero();
    const int64_t end = std::min(start + w.group, w.K);
    for (int64_t k = start; k < end; k += Reader<WHERE, BITS>::INPUTS)
      reader.template step<MB, A>(x + k, ldx, sum);
    const Floats s = load_bfloat16(scale);
    for (int m = 0; m < MB; ++m) {
      for (int a = 1; a < A; ++a) sum[m][0] = add(sum[m][0], sum[m][a]);
      total[m] = fma(s, sum[m][0], total[m]);
    }
  }
  for (int m = 0; m < MB; ++m) store(y + m * ldy, total[m]);
}

// y[m][0..16) (+)= the tile times x[m], m < M, decoding the weights once for eight rows
template <Where WHERE, int BITS>
static inline void tile_times_rows(const Matrix& w, int64_t tile, const float* x, int64_t ldx,
                                   int64_t M, float* y, int64_t ldy, bool accumulate) {
  int64_t m = 0;
#define SLIMFX_ROWS(MB) \
  for (; m + MB <= M; m += MB) \
    rows<WHERE, BITS, MB>(w, tile, x + m * ldx, ldx, y + m * ldy, ldy, accumulate);
  SLIMFX_ROWS(8) SLIMFX_ROWS(4) SLIMFX_ROWS(2) SLIMFX_ROWS(1)
#undef SLIMFX_ROWS
}

// ---- many rows: expand a panel of weights, then multiply it by blocks of x ------------------

constexpr int PANEL_INPUTS = 512;
constexpr int PANEL_WIDTH = PAIR * LANES;

// x [M, K] -> rows block * BLOCK_ROWS... as [K][BLOCK_ROWS]; rows beyond M are zero
static inline void pack_block(const float* x, int64_t ldx, int64_t M, int64_t K, int64_t block,
                              float* to) {
  for (int r = 0; r < BLOCK_ROWS; ++r) {
    const int64_t m = block * BLOCK_ROWS + r;
    for (int64_t k = 0; k < K; ++k) to[k * BLOCK_ROWS + r] = m < M ? x[m * ldx + k] : 0.0f;
  }
}

// y [blocks * BLOCK_ROWS][WIDTH] (+)= PAIR tiles, of which `count` exist, times the blocks of x
template <Where WHERE, int BITS>
static inline void pair_times_blocks(const Matrix& w, int64_t tile, int count, const float* packed,
                                     int64_t stride, int64_t blocks, float* y, float* panel,
                                     bool accumulate) {
  using R = Reader<WHERE, BITS>;
  R readers[2] = {R(w.data + tile * w.tile_bytes, w.K),
                  R(w.data + (tile + count - 1) * w.tile_bytes, w.K)};
  const int64_t groups = (w.K + w.group - 1) / w.group;
  for (int64_t start = 0; start < w.K; start += PANEL_INPUTS) {
    const int64_t length = std::min<int64_t>(PANEL_INPUTS, w.K - start);
    for (int t = 0; t < count; ++t)
      for (int64_t k = 0; k < length; k += R::INPUTS) {
        const int64_t group = (start + k) / w.group;
        const Floats scale = load_bfloat16(w.scale + ((tile + t) * groups + group) * LANES);
        readers[t].expand(panel + k * PANEL_WIDTH + t * LANES, PANEL_WIDTH, scale);
      }
    for (int64_t b = 0; b < blocks; ++b) {
      const float* x = packed + b * stride + start * BLOCK_ROWS;
      float* out = y + b * BLOCK_ROWS * WIDTH;
      Floats sum[BLOCK_ROWS][PAIR];
      for (int r = 0; r < BLOCK_ROWS; ++r)
        for (int t = 0; t < PAIR; ++t)
          sum[r][t] = start || accumulate ? load(out + r * WIDTH + t * LANES) : zero();
      for (int64_t k = 0; k < length; ++k) {
        Floats column[PAIR];
        for (int t = 0; t < PAIR; ++t) column[t] = load(panel + k * PANEL_WIDTH + t * LANES);
        for (int r = 0; r < BLOCK_ROWS; ++r) {
          const Floats value = all(x[k * BLOCK_ROWS + r]);
          for (int t = 0; t < PAIR; ++t) sum[r][t] = fma(value, column[t], sum[r][t]);
        }
      }
      for (int r = 0; r < BLOCK_ROWS; ++r)
        for (int t = 0; t < PAIR; ++t) store(out + r * WIDTH + t * LANES, sum[r][t]);
    }
  }
}

// ---- eight-bit inputs ------------------------------------------------------------------------

// x rounded to a multiple of `step` = max |x| / 127, row by row, stored as 128 + code
struct Rounded {
  uint8_t* codes;  // [M, K]
  float* step;     // [M]
};

static inline void round_row(float* x, int64_t K, int64_t m, const Rounded& to) {
  float peak = 0;
  for (int64_t k = 0; k < K; ++k) peak = std::max(peak, std::fabs(x[k]));
  const float step = peak > 0 ? peak / 127.0f : 1.0f, inverse = 1.0f / step;
  for (int64_t k = 0; k < K; ++k) {
    const int code = (int)std::nearbyint(x[k] * inverse);
    to.codes[m * K + k] = (uint8_t)(code + 128);
    x[k] = (float)code * step;  // what kernels without 8-bit products multiply by
  }
  to.step[m] = step;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool INTEGER_PRODUCTS = true;

// bytes of four inputs in every lane, quad q of a step; codes of 4 bits come times 16
template <Where WHERE, int BITS> struct Quads {
  using R = Reader<WHERE, BITS>;
  __m512i words[4];
  __m512i at;
  explicit Quads(const uint8_t* p) {
    const __m512i high = _mm512_set1_epi8((char)0xf0);
    constexpr int values = WHERE == TWO_FOUR ? 8 : 16;
    constexpr int stored = values * BITS / 32;
    for (int i = 0; i < stored; ++i) {
      const __m512i v = _mm512_loadu_si512(p + 64 * i);
      if constexpr (BITS == 4) {
        words[2 * i] = _mm512_and_si512(_mm512_slli_epi16(v, 4), high);
        words[2 * i + 1] = _mm512_and_si512(v, high);
      } else {
        words[i] = v;
      }
    }
    if constexpr (WHERE == TWO_FOUR) at = load_halves(p + R::VALUES).v;
  }
  template <int q> inline __m512i quad() const {
    if constexpr (WHERE == DENSE) return words[q];
    else {
      // by the two positions: a byte picks value 0 or 1 of its group, or nothing
      alignas(64) static constexpr uint8_t table[16][4] = {
          {1, 128, 128, 128}, {1, 0, 128, 128}, {1, 128, 0, 128}, {1, 128, 128, 0},
          {0, 1, 128, 128}, {128, 1, 128, 128}, {128, 1, 0, 128}, {128, 1, 128, 0},
          {0, 128, 1, 128}, {128, 0, 1, 128}, {128, 128, 1, 128}, {128, 128, 1, 0},
          {0, 128, 128, 1}, {128, 0, 128, 1}, {128, 128, 0, 1}, {128, 128, 128, 1}};
      const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
      const __m512i base = q % 2 ? _mm512_add_epi8(lane, _mm512_set1_epi8(2)) : lane;
      const __m512i pick = _mm512_permutexvar_epi32(_mm512_srli_epi32(at, 4 * q),
                                                    _mm512_load_si512(table));
      return _mm512_shuffle_epi8(words[q / 2], _mm512_or_si512(pick, base));
    }
  }
};

template <Where WHERE, int BITS, int MB>
static inline void rounded_rows(const Matrix& w, int64_t tile, const Rounded& x, int64_t row,
                                float* y, int64_t ldy) {
  using R = Reader<WHERE, BITS>;
  const uint8_t* p = w.data + tile * w.tile_bytes;
  const uint16_t* scale = w.scale + tile * ((w.K + w.group - 1) / w.group) * LANES;
  const __m512i ones = _mm512_set1_epi8(1);
  Floats total[MB];
  for (int m = 0; m < MB; ++m) total[m] = zero();
  for (int64_t start = 0; start < w.K; start += w.group, scale += LANES) {
    __m512i sum[MB][2], codes[2];
    for (int a = 0; a < 2; ++a) {
      codes[a] = _mm512_setzero_si512();
      for (int m = 0; m < MB; ++m) sum[m][a] = _mm512_setzero_si512();
    }
    const int64_t end = std::min(start + w.group, w.K);
    for (int64_t k = start; k < end; k += 16, p += R::BYTES) {
      const Quads<WHERE, BITS> step(p);
      unroll<4>([&](auto q) {
        const __m512i bytes = step.template quad<q>();
        codes[q % 2] = _mm512_dpbusd_epi32(codes[q % 2], ones, bytes);
        for (int m = 0; m < MB; ++m) {
          int32_t four;
          std::memcpy(&four, x.codes + (row + m) * w.K + k + 4 * q, 4);
          sum[m][q % 2] = _mm512_dpbusd_epi32(sum[m][q % 2], _mm512_set1_epi32(four), bytes);
        }
      });
    }
    const __m512i shift = _mm512_slli_epi32(_mm512_add_epi32(codes[0], codes[1]), 7);
    const Floats s = mul(load_bfloat16(scale), all(BITS == 4 ? 1.0f / 16 : 1.0f));
    for (int m = 0; m < MB; ++m) {
      const __m512i exact = _mm512_sub_epi32(_mm512_add_epi32(sum[m][0], sum[m][1]), shift);
      total[m] = fma(s, {_mm512_cvtepi32_ps(exact)}, total[m]);
    }
  }
  for (int m = 0; m < MB; ++m) store(y + m * ldy, mul(total[m], all(x.step[row + m])));
}

template <Where WHERE, int BITS>
static inline void tile_times_rounded(const Matrix& w, int64_t tile, const Rounded& x, int64_t M,
                                      float* y, int64_t ldy) {
  int64_t m = 0;
#define SLIMFX_ROWS(MB) \
  for (; m + MB <= M; m += MB) rounded_rows<WHERE, BITS, MB>(w, tile, x, m, y + m * ldy, ldy);
  SLIMFX_ROWS(8) SLIMFX_ROWS(4) SLIMFX_ROWS(2) SLIMFX_ROWS(1)
#undef SLIMFX_ROWS
}
#else
constexpr bool INTEGER_PRODUCTS = false;

template <Where WHERE, int BITS>
static inline void tile_times_rounded(const Matrix&, int64_t, const Rounded&, int64_t, float*,
                                      int64_t) {}
#endif

// ---- a whole linear, with its adapters and the neighbours that read the same x ----------------

template <Where WHERE_, int BITS_> struct Stored {
  static constexpr Where WHERE = WHERE_;
  static constexpr int BITS = BITS_;
};

// y[:, start : start + rows] = x W^T + (x L^T) R^T; `hidden` is where x L^T begins in the hidden
// rows of all parts, which are multiples of 16. All starts are multiples of 32.
struct Part {
  int64_t start, rows, hidden, rank;
  Matrix weight, first, second;
};

// Where in the memory of a call its parts begin.
struct Scratch {
  int64_t x, packed, hidden, packed_hidden, sums, codes, total;  // in floats
  Scratch(int64_t M, int64_t K, int64_t hidden_rows, int64_t columns, bool copies, bool blocked,
          bool rounded) {
    const int64_t blocks = (M + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    x = 0;
    packed = x + (copies ? M * K : 0);
    hidden = packed + (blocked ? blocks * K : 0);
    packed_hidden = hidden + (blocked ? 0 : M * hidden_rows);
    sums = packed_hidden + (blocked ? blocks * hidden_rows : 0);
    codes = sums + (hidden_rows && !blocked ? M * ((columns + WIDTH - 1) / WIDTH * WIDTH) : 0);
    total = codes + (rounded ? M + (M * K + 3) / 4 : 0);
  }
};

static inline float as_float(float x) { return x; }
template <class T> static inline float as_float(T x) { return static_cast<float>(x); }

// As many rows of x as stay in the caches while all weights pass by.
static inline int64_t rows_at_once(int64_t K) {
  constexpr int64_t unit = 48, bytes = 8 << 20;  // a multiple of every BLOCK_ROWS
  return std::clamp<int64_t>(bytes / (4 * K) / unit, 1, 5) * unit;
}

template <class W, class L, class R, bool ROUND, class T, class Store>
static inline void some_rows(const T* x, int64_t M, int64_t inputs, const Part* parts, int count,
                             Store&& store) {
  const int64_t K = parts[0].weight.K;
  const Part& last = parts[count - 1];
  const int64_t hidden_rows = last.hidden + last.rank, columns = last.start + last.rows;
  constexpr bool integers = ROUND && INTEGER_PRODUCTS && W::WHERE != BITMASK && W::BITS < 16;
  const bool blocked = !integers && M > (W::WHERE == TWO_FOUR ? 48 : 32);
  const bool copies = ROUND || inputs != K || !std::is_same<T, float>::value;
  const int64_t blocks = (M + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const Scratch at(M, K, hidden_rows, columns, copies, blocked, ROUND);
  std::unique_ptr<float[]> memory(new float[at.total + 1]);
  float* const scratch = memory.get();
  const float* wide = copies ? scratch + at.x : (const float*)x;
  const Rounded rounded{(uint8_t*)(scratch + at.codes + M), scratch + at.codes};
  float* const hidden = scratch + at.hidden;
  auto part_of = [&](int64_t n) {
    int i = 0;
    while (i + 1 < count && parts[i + 1].start <= n) ++i;
    return i;
  };
  auto width_of = [&](int64_t n) {
    const Part& part = parts[part_of(n)];
    return std::min<int64_t>(WIDTH, part.start + part.rows - n);
  };
  const bool in_turn = hidden_rows && !blocked;  // adapters are added when all of x L^T is there
#pragma omp parallel
  {
    std::unique_ptr<float[]> own(new float[(blocked ? blocks * BLOCK_ROWS : M) * WIDTH +
                                           (blocked ? PANEL_INPUTS * PANEL_WIDTH : 0)]);
    float* const y = own.get();
    float* const panel = y + blocks * BLOCK_ROWS * WIDTH;
    if (copies) {
#pragma omp for
      for (int64_t m = 0; m < M; ++m) {
        float* row = scratch + at.x + m * K;
        for (int64_t k = 0; k < inputs; ++k) row[k] = as_float(x[m * inputs + k]);
        for (int64_t k = inputs; k < K; ++k) row[k] = 0;
        if (ROUND) round_row(row, K, m, rounded);
      }
    }
    if (blocked) {
#pragma omp for
      for (int64_t b = 0; b < blocks; ++b)
        pack_block(wide, K, M, K, b, scratch + at.packed + b * K * BLOCK_ROWS);
    }
    if (hidden_rows) {
#pragma omp for schedule(static) nowait
      for (int64_t h = 0; h < hidden_rows; h += LANES) {
        int i = 0;
        while (i + 1 < count && parts[i + 1].hidden <= h) ++i;
        const Matrix& first = parts[i].first;
        const int64_t tile = (h - parts[i].hidden) / LANES;
        if (blocked) {
          pair_times_blocks<L::WHERE, L::BITS>(first, tile, 1, scratch + at.packed, K * BLOCK_ROWS,
                                               blocks, y, panel, false);
          for (int64_t b = 0; b < blocks; ++b) {
            float* to = scratch + at.packed_hidden + (b * hidden_rows + h) * BLOCK_ROWS;
            for (int r = 0; r < BLOCK_ROWS; ++r)
              for (int lane = 0; lane < LANES; ++lane)
                to[lane * BLOCK_ROWS + r] = y[(b * BLOCK_ROWS + r) * WIDTH + lane];
          }
        } else if constexpr (integers && L::WHERE != BITMASK && L::BITS < 16) {
          tile_times_rounded<L::WHERE, L::BITS>(first, tile, rounded, M, hidden + h, hidden_rows);
        } else {
          tile_times_rows<L::WHERE, L::BITS>(first, tile, wide, K, M, hidden + h, hidden_rows, false);
        }
      }
      if (blocked) {
#pragma omp barrier
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < columns; n += WIDTH) {
      const Part& part = parts[part_of(n)];
      const int64_t tile = (n - part.start) / LANES, width = width_of(n);
      const int tiles = width > LANES ? 2 : 1;
      float* const sum = in_turn ? scratch + at.sums + n * M : y;
      for (int t = 0; t < tiles; t += blocked ? PAIR : 1) {
        float* out = sum + t * LANES;
        const int64_t i = tile + t;
        if (blocked) {
          const int pair = std::min(PAIR, tiles - t);
          pair_times_blocks<W::WHERE, W::BITS>(part.weight, i, pair, scratch + at.packed,
                                               K * BLOCK_ROWS, blocks, out, panel, false);
          if (part.rank)
            pair_times_blocks<R::WHERE, R::BITS>(
                part.second, i, pair, scratch + at.packed_hidden + part.hidden * BLOCK_ROWS,
                hidden_rows * BLOCK_ROWS, blocks, out, panel, true);
        } else if constexpr (integers) {
          tile_times_rounded<W::WHERE, W::BITS>(part.weight, i, rounded, M, out, WIDTH);
        } else {
          tile_times_rows<W::WHERE, W::BITS>(part.weight, i, wide, K, M, out, WIDTH, false);
        }
      }
      if (!in_turn) store(n, width, sum);
    }
    if (in_turn) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < columns; n += WIDTH) {
        const Part& part = parts[part_of(n)];
        const int64_t tile = (n - part.start) / LANES, width = width_of(n);
        float* const sum = scratch + at.sums + n * M;
        for (int t = 0; part.rank && t < (width > LANES ? 2 : 1); ++t)
          tile_times_rows<R::WHERE, R::BITS>(part.second, tile + t, hidden + part.hidden,
                                             hidden_rows, M, sum + t * LANES, WIDTH, true);
        store(n, width, sum);
      }
    }
  }
}

// x [M, inputs] in rows of `inputs`; K is inputs rounded up to 16. `store(m, rows, n, width, y)`
// takes rows m to m + rows of columns n to n + width, from y [rows][WIDTH].
template <class W, class L, class R, bool ROUND, class T, class Store>
static inline void linear(const T* x, int64_t M, int64_t inputs, const Part* parts, int count,
                          Store&& store) {
  const int64_t most = rows_at_once(parts[0].weight.K);
  for (int64_t m = 0; m < M; m += most) {
    const int64_t rows = std::min(most, M - m);
    some_rows<W, L, R, ROUND>(x + m * inputs, rows, inputs, parts, count,
                              [&](int64_t n, int64_t width, float* y) {
                                store(m, rows, n, width, y);
                              });
  }
}

}  // namespace slimfx
#endif
