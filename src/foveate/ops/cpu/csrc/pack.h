// Rows into lanes and back, and chunks of keys or values brought into the form a product wants.
#pragma once
#include "micro.h"

namespace foveate {
namespace FOVEATE_ISA {

// How elements of type T meet product P: Single works on fp32, so 16-bit types are widened; Pair
// works on bf16 two by two.
template <class P> INLINE constexpr int elements(int dim) { return (dim + P::PAIR - 1) / P::PAIR; }

// VL 32-bit elements from position `at` on; what lies behind the end of the row is 0.
template <class P, class T> INLINE vf element_block(const T* row, int at, int dim) {
  int first = at * P::PAIR, n = dim - first;
  if (P::PAIR == 2) {
    if (n >= 2 * VL) return load((const float*)(row + first));
    T part[2 * VL];
    memset(part, 0, sizeof part);
    if (n > 0) memcpy(part, row + first, n * sizeof(T));
    return load((const float*)part);
  }
  if (n >= VL) return widen(row + first);
  return n > 0 ? widen_part(row + first, n) : vf{};
}

// to[element][W lanes] from up to W rows (null: zeros), for elements(dim) elements.
template <class P, class T>
INLINE void rows_to_lanes(const T* const* row, int width, int dim, float* to) {
  int n = elements<P>(dim);
  for (int r = 0; r < width; r += VL)
    for (int e = 0; e < n; e += VL) {
      vf t[VL];
      for (int i = 0; i < VL; ++i) t[i] = row[r + i] ? element_block<P>(row[r + i], e, dim) : vf{};
      transpose(t);
      int m = n - e < VL ? n - e : VL;
      for (int i = 0; i < m; ++i) store(to + (int64_t)(e + i) * width + r, t[i]);
    }
}

// Rows of T from lanes: row[r][d] = from[d][r] * scale[r]; null rows are left out.
template <class T>
INLINE void lanes_to_rows(const float* from, int width, int dim, const float* scale, T* const* row) {
  for (int r = 0; r < width; r += VL)
    for (int d = 0; d < dim; d += VL) {
      vf t[VL], factor = load(scale + r);
      int m = dim - d < VL ? dim - d : VL;
      for (int i = 0; i < VL; ++i)
        t[i] = i < m ? load(from + (int64_t)(d + i) * width + r) * factor : vf{};
      transpose(t);
      for (int i = 0; i < VL; ++i) {
        if (!row[r + i]) continue;
        if (m == VL) narrow(row[r + i] + d, t[i]);
        else narrow_part(row[r + i] + d, t[i], m);
      }
    }
}

// Rows widened or copied into `to`, `stride` elements apart, zero-padded to a multiple of VL.
template <class P, class T>
INLINE void copy_rows(const T* const* row, int n, int dim, int64_t stride, float* to) {
  int e = elements<P>(dim);
  for (int j = 0; j < n; ++j)
    for (int at = 0; at < e; at += VL) store(to + j * stride + at, element_block<P>(row[j], at, dim));
}

#if defined(__AVX512BF16__)
// For `permutex2var`: elements `first`, first + 1, ... of two vectors side by side.
INLINE __m512i pair_order(int first) {
  static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                   8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_add_epi16(_mm512_loadu_si512(low), _mm512_set1_epi16((short)first));
}

// to[pair of rows][d] = (row 2i, row 2i + 1) side by side; an odd last row meets zeros.
INLINE void interleave_rows(const bf16* const* row, int n, int dim, int64_t stride, float* to) {
  __m512i lo = pair_order(0), hi = pair_order(16);
  for (int j = 0; j < n; j += 2) {
    const bf16 *a = row[j], *b = j + 1 < n ? row[j + 1] : nullptr;
    for (int d = 0; d < dim; d += 32) {
      int m = dim - d;
      __mmask32 k = m >= 32 ? ~0u : (1u << m) - 1;
      __m512i x = a ? _mm512_maskz_loadu_epi16(k, a + d) : _mm512_setzero_si512();
      __m512i y = b ? _mm512_maskz_loadu_epi16(k, b + d) : _mm512_setzero_si512();
      float* at = to + j / 2 * stride + d;
      _mm512_storeu_si512(at, _mm512_permutex2var_epi16(x, lo, y));
      if (m > 16) _mm512_storeu_si512(at + 16, _mm512_permutex2var_epi16(x, hi, y));
    }
  }
}
#endif

}  // namespace FOVEATE_ISA
}  // namespace foveate
