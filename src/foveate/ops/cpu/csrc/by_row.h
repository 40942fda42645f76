// Values for blocks of few rows: elements of the values in the lanes, weights read one by one. Each
// vector of values meets all rows, so that nothing is repeated, and bf16 pairs are made in registers.
#pragma once
#include "pack.h"

namespace foveate {
namespace FOVEATE_ISA {

// Where `settle` and the softmax have put the weight of row r and key j, or pair j of keys:
// p[j / EACH * GROUP + j % EACH + r * ROW]. Pairs take half the room, but for F = 1.
template <class P, int F> struct Weights {
  static constexpr int HALF = P::PAIR == 2 && F > 1 ? 2 : 1;
  static constexpr int EACH = F / HALF, GROUP = VL / HALF, ROW = F / HALF;
};

// Weights of F keys a vector as pairs, in place.
template <class P> INLINE void pair_weights(float* p, int vectors) {
#if defined(__AVX512BF16__)
  if (P::PAIR == 2)
    for (int i = 0; i < vectors; ++i) narrow((bf16*)p + i * VL, load(p + i * VL));
#else
  (void)p;
  (void)vectors;
#endif
}

// M vectors of values from element `at` on: of key j, or of keys 2j and 2j + 1 as pairs.
template <class P, int M, class Values>
INLINE void take_values(const Values& v, int j, int n, int at, int dim, vf* x) {
#if defined(__AVX512BF16__)
  if (P::PAIR == 2) {
    bool two = 2 * j + 1 < n;  // an odd last key meets zeros
    const bf16 *a = (const bf16*)v.row(2 * j), *b = (const bf16*)v.row(two ? 2 * j + 1 : 2 * j);
    UNROLL for (int m = 0; m + 1 < M; m += 2) {
      int left = dim - at - m * VL;
      __m512i lo, hi;
      if (two && left >= 2 * VL) {
        lo = _mm512_loadu_si512(a + at + m * VL);
        hi = _mm512_loadu_si512(b + at + m * VL);
      } else {
        __mmask32 some = left >= 2 * VL ? ~0u : left > 0 ? (1u << left) - 1 : 0;
        lo = _mm512_maskz_loadu_epi16(some, a + at + m * VL);
        hi = _mm512_maskz_loadu_epi16(two ? some : 0, b + at + m * VL);
      }
      x[m] = (vf)_mm512_permutex2var_epi16(lo, pair_order(0), hi);
      x[m + 1] = (vf)_mm512_permutex2var_epi16(lo, pair_order(16), hi);
    }
    return;
  }
#endif
  UNROLL for (int m = 0; m < M; ++m) x[m] = load(v.row(j) + at + m * VL);
}

// As many lines of the rows ahead: the next ones, or the same elements'.
template <class P, int M, class Values> INLINE void fetch_values(const Values& v, int j, int n, int at) {
  if (v.joined()) {
    const char* next = v.next(0) + (int64_t)at * (4 / P::PAIR) * n + j * M * 64;
    UNROLL for (int m = 0; m < M; ++m) prefetch(next + m * 64);
    return;
  }
  UNROLL for (int i = 0; i < P::PAIR; ++i) {
    if (i && j * P::PAIR + i >= n) break;
    const char* row = v.next(j * P::PAIR + i) + at * (4 / P::PAIR);
    UNROLL for (int m = 0; m < M; m += P::PAIR) prefetch(row + m * VL * (4 / P::PAIR));
  }
}

// M vectors of R rows of `values_by_row`. Few sums are kept apart by keys, so that none waits for itself.
template <class P, int F, int R, int M, class Values>
INLINE void values_by_row_of(const float* p, const Values& v, int n, int at, int dim, float* o,
                             int64_t stride, const float* alpha, bool first, bool fetch) {
  using W = Weights<P, F>;
  constexpr int APART = R * M >= 8 ? 1 : 8 / (R * M);
  vf acc[APART][R][M];
  UNROLL for (int i = 0; i < APART; ++i)
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int m = 0; m < M; ++m) acc[i][r][m] = vf{};
  auto add = [&](int j, int i) __attribute__((always_inline)) {
    if (fetch) fetch_values<P, M>(v, j, n, at);
    const float* weight = p + (unsigned)j / W::EACH * W::GROUP + (unsigned)j % W::EACH;
    vf x[M];
    take_values<P, M>(v, j, n, at, dim, x);
    UNROLL for (int r = 0; r < R; ++r) {
      vf y = set1(scalar(weight + r * W::ROW));
      UNROLL for (int m = 0; m < M; ++m) acc[i][r][m] = P::fma(acc[i][r][m], x[m], y);
    }
  };
  int j = 0;
  for (; (j + APART) * P::PAIR <= n; j += APART) UNROLL for (int i = 0; i < APART; ++i) add(j + i, i);
  for (; j * P::PAIR < n; ++j) add(j, 0);
  UNROLL for (int i = 1; i < APART; ++i)
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int m = 0; m < M; ++m) acc[0][r][m] += acc[i][r][m];
  UNROLL for (int r = 0; r < R; ++r) {
    vf scale = set1(alpha[r * F]);
    UNROLL for (int m = 0; m < M; ++m) {
      float* to_row = o + r * stride + at + m * VL;
      store(to_row, first ? acc[0][r][m] : load(to_row) * scale + acc[0][r][m]);
    }
  }
}

// o[row][d] = o[row][d] * alpha[row * F] + sum over j < n of p[row][j] * v[j][d] for VL / F rows,
// `stride` floats apart, which hold whole vectors; the old o counts as 0 if `first`. Values are read
// where they lie, also bf16 by pairs; rows of fp32 must be whole vectors too.
template <class P, int F, class Values>
void values_by_row(const float* p, Values v, int n, int dim, float* o, int64_t stride, const float* alpha,
                   bool first) {
  using W = Weights<P, F>;
  // 16 rows of fp32 at once read each value once; of pairs, which come by two vectors, 8 are quicker. Few
  // enough rows take whole rows of values, where these are read in the order of memory.
  constexpr int FEW = Values::IN_ORDER && VL == 16 ? 256 / Values::IN_ORDER : VL, LEAST = P::PAIR;
  constexpr int ALL = VL / F, MOST = ALL == 16 && P::PAIR == 2 ? 8 : ALL, R = MOST < FEW ? MOST : FEW;
#if defined(__AVX512F__)
  constexpr int M = R >= 2 ? 16 / R : 8;
#else
  constexpr int M = R >= 2 ? 8 / R : 4;
#endif
  constexpr int HALF = M / 2 > LEAST ? M / 2 : LEAST;
  auto run = [&](int at, auto size) __attribute__((always_inline)) {
    constexpr int N = decltype(size)::value;
    for (int r = 0; r < ALL; r += R)
      values_by_row_of<P, F, R, N>(p + r * W::ROW, v, n, at, dim, o + r * stride, stride, alpha + r * F,
                                   first, !r && v.ahead());
  };
  int at = 0;
  for (; at + M * VL <= dim; at += M * VL) run(at, Size<M>{});
  for (; at + HALF * VL <= dim; at += HALF * VL) run(at, Size<HALF>{});
  for (; at < dim; at += LEAST * VL) run(at, Size<LEAST>{});
}

// The way back: to[d][width] from rows.
INLINE void turn_rows(const float* from, int64_t stride, int width, int rows, int dim, float* to) {
  for (int d = 0; d < dim; ++d)
    for (int r = 0; r < rows; ++r) to[(int64_t)d * width + r] = from[r * stride + d];
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
