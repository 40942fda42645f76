// Products of bf16 by the processor's tile unit (AMX): C[16][16] += A[16][32] B[16 pairs][16], C in fp32.
// For scores keys are A, and queries, which have rows in lanes already, by pairs, are the B that is wanted; so
// scores lie as in the other kernels, and weights are a B in their turn. Here is what brings rows into form.
#pragma once
#include "pack.h"
#include "softmax.h"

namespace foveate {
namespace FOVEATE_ISA {

#if defined(__AMX_BF16__)
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif
constexpr int FEWER = 2;       // forward of blocks of at most so many rows is quicker without tiles
constexpr int TILE_KEYS = 32;  // what a product sums over comes by so many

#if defined(__AMX_BF16__)

// All eight tiles in their full size, for as long as this lives.
struct TileUnit {
  bool on;
  explicit TileUnit(bool wanted) : on(wanted) {
    if (!on) return;
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() {
    if (on) asm volatile("tilerelease" ::: "memory");
  }
};

template <int T> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INLINE void tile_load(const void* p, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(T) : "memory");
}
template <int T> INLINE void tile_store(void* p, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes), "i"(T) : "memory");
}
template <int C, int A, int B> INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// A matrix in memory: rows `stride` floats (or pairs of bf16) apart.
struct Matrix {
  float* at;
  int64_t stride;
};

// M x N tiles of c (+)= a b, over `steps` tiles of what they share. Tiles 0 .. 3 hold c.
template <int M, int N> INLINE void tiles_of(Matrix a, Matrix b, int steps, Matrix c, bool add) {
  int64_t sa = a.stride * 4, sb = b.stride * 4, sc = c.stride * 4;
  float *c1 = c.at + 16, *c2 = c.at + 16 * c.stride, *c3 = c2 + 16;
  if (add) {
    tile_load<0>(c.at, sc);
    if (N == 2) tile_load<1>(c1, sc);
    if (M == 2) tile_load<2>(c2, sc);
    if (M == 2 && N == 2) tile_load<3>(c3, sc);
  } else {
    tile_zero<0>();
    if (N == 2) tile_zero<1>();
    if (M == 2) tile_zero<2>();
    if (M == 2 && N == 2) tile_zero<3>();
  }
  for (int t = 0; t < steps; ++t) {
    const float *x = a.at + t * 16, *y = b.at + t * 16 * b.stride;
    tile_load<4>(x, sa);
    tile_load<6>(y, sb);
    tile_product<0, 4, 6>();
    if (N == 2) {
      tile_load<7>(y + 16, sb);
      tile_product<1, 4, 7>();
    }
    if (M == 2) {
      tile_load<5>(x + 16 * a.stride, sa);
      tile_product<2, 5, 6>();
      if (N == 2) tile_product<3, 5, 7>();
    }
  }
  tile_store<0>(c.at, sc);
  if (N == 2) tile_store<1>(c1, sc);
  if (M == 2) tile_store<2>(c2, sc);
  if (M == 2 && N == 2) tile_store<3>(c3, sc);
}

// c[m][n] (+)= a[m][.] b[.][n]; m and n in sixteens.
INLINE void tiles(Matrix a, Matrix b, int m, int n, int steps, Matrix c, bool add) {
  for (int r = 0; r < n; r += 32)
    for (int i = 0; i < m; i += 32) {
      Matrix ai = {a.at + i * a.stride, a.stride}, br = {b.at + r, b.stride};
      Matrix to = {c.at + i * c.stride + r, c.stride};
      bool two = m - i >= 32;
      if (n - r >= 32) two ? tiles_of<2, 2>(ai, br, steps, to, add) : tiles_of<1, 2>(ai, br, steps, to, add);
      else two ? tiles_of<2, 1>(ai, br, steps, to, add) : tiles_of<1, 1>(ai, br, steps, to, add);
    }
}

// Rows side by side, `pairs` pairs of elements each, zeros behind their ends and in rows that fill up the last
// tile. Fetches the rows `next` (null: none).
INLINE void copy_pairs(const bf16* const* row, int n, int dim, int64_t pairs, float* to, const bf16* const* next) {
  for (int j = 0; j < (int)padded(n, TILE_KEYS); ++j)
    for (int e = 0; e < pairs; e += VL) {
      if (next && j < n) prefetch((const char*)next[j] + e * 4);
      store(to + j * pairs + e, j < n ? element_block<Pair>(row[j], e, dim) : vf{});
    }
}

// to[d][pair of rows], `pairs` apart: rows turned, with zeros for rows that fill up the last tile. What fills
// up d is anything: it makes sums that nobody reads. Fetches the rows `next` (null: none).
INLINE void turn_pairs(const bf16* const* row, int n, int dim, int64_t pairs, float* to, const bf16* const* next) {
  const __mmask32 high = 0xaaaaaaaa;
  for (int j = 0; j < n; j += 32)
    for (int d = 0; d < dim; d += 32) {
      int m = dim - d;
      __mmask32 some = m >= 32 ? ~0u : (1u << m) - 1;
      vf even[16], odd[16];
      for (int i = 0; i < 16; ++i) {
        int at = j + 2 * i;
        if (next && at < n) prefetch((const char*)(next[at] + d)), prefetch((const char*)(next[at + 1] + d));
        __m512i a = at < n ? _mm512_maskz_loadu_epi16(some, row[at] + d) : _mm512_setzero_si512();
        __m512i b = at + 1 < n ? _mm512_maskz_loadu_epi16(some, row[at + 1] + d) : _mm512_setzero_si512();
        even[i] = (vf)_mm512_mask_blend_epi16(high, a, _mm512_slli_epi32(b, 16));
        odd[i] = (vf)_mm512_mask_blend_epi16(high, _mm512_srli_epi32(a, 16), b);
      }
      transpose(even);
      transpose(odd);
      float* at = to + d * pairs + j / 2;
      for (int i = 0; i < 16 && 2 * i < m; ++i) {
        store(at + 2 * i * pairs, even[i]);
        store(at + (2 * i + 1) * pairs, odd[i]);
      }
    }
}

// A row's "maximum" may be less than its largest score by so much (base 2): weights are then at most 256, which
// rounds as well as 1, and sums need to be scaled only where scores outgrow it.
constexpr float SLACK = 8;

// s[key][stride] to weights as `soften_pairs` does, in place, with maxima taken here. Keys are hidden from rows
// whose bit in `seen` is clear (null: every row sees every key). Returns whether alpha is other than 1 somewhere.
// `keys` fill tiles. Fetches `lines` lines from `next` on meanwhile.
INLINE bool soften_tiles(float* s, int64_t stride, int width, int keys, const uint64_t* seen, int shift, float c,
                         float* max, float* total, float* alpha, const char* next, int lines) {
  __mmask16 moved = 0;
  for (int r = 0; r < width; r += VL) {
    vf m[4];
    for (int i = 0; i < 4; ++i) m[i] = set1(-__builtin_inff());
    if (seen) {
      for (int j = 0; j < keys; j += 2)
        UNROLL for (int i = 0; i < 2; ++i) {
          float* at = s + (j + i) * stride + r;
          vf x = select((uint32_t)(seen[j + i] >> (shift + r)), load(at), set1(-__builtin_inff()));
          store(at, x);
          m[i] = vmax(m[i], x);
        }
    } else {
      for (int j = 0; j < keys; j += 4)
        UNROLL for (int i = 0; i < 4; ++i) m[i] = vmax(m[i], load(s + (j + i) * stride + r));
    }
    vf old = load(max + r), top = vmax(vmax(m[0], m[1]), vmax(m[2], m[3])) * c;
    __mmask16 grown = _mm512_cmp_ps_mask((__m512)top, (__m512)(old + SLACK), _CMP_GT_OQ);
    vf now = select(grown, top, old);
    vf a = set1(1.0f);
    if (grown) a = decay(old, now);
    vf t0 = vf{}, t1 = vf{};
    float* p = s + r;
    for (int j = 0; j < keys; j += 2, p += stride) {
      if (lines > 0) {
        UNROLL for (int i = 0; i < 4; ++i) __builtin_prefetch(next + i * 64, 1, 3);
        next += 256;
        lines -= 4;
      }
      vf x = exp2v<4>(load(s + j * stride + r) * c - now);
      vf y = exp2v<4>(load(s + (j + 1) * stride + r) * c - now);
      store(p, interleave(x, y));
      t0 += x;
      t1 += y;
    }
    store(max + r, now);
    store(alpha + r, a);
    store(total + r, load(total + r) * a + t0 + t1);
    moved |= grown;
  }
  return moved;
}

// o[d][row] *= alpha[row].
INLINE void rescale(float* o, int dim, int width, const float* alpha) {
  for (int r = 0; r < width; r += VL) {
    vf a = load(alpha + r);
    for (int d = 0; d < dim; ++d) store(o + (int64_t)d * width + r, load(o + (int64_t)d * width + r) * a);
  }
}
#endif

}  // namespace FOVEATE_ISA
}  // namespace foveate
