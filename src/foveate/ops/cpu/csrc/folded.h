// Blocks of few rows, as in decoding: a vector holds `VL / F` rows times F neighbouring elements of
// each, so that no lane idles. Lane r * F + i is element i of row r; keys are read F elements at a
// time, repeated for every row.
#pragma once
#include "micro.h"

namespace foveate {
namespace FOVEATE_ISA {

// F floats repeated through the vector.
template <int F> INLINE vf load_group(const float* p) {
  if (F == VL) return load(p);
  if (F == 1) return set1(scalar(p));
#if defined(__AVX512F__)
  if (F == 2) {
    double pair;
    memcpy(&pair, p, 8);
    return (vf)_mm512_set1_pd(pair);
  }
  if (F == 4) return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
  return (vf)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
#else
  vf v;
  for (int i = 0; i < VL; i += F) memcpy((char*)&v + i * 4, p, F * 4);
  return v;
#endif
}

// Every lane gets the sum of its row's F lanes.
template <int F> INLINE vf sum_groups(vf x) {
#if defined(__AVX512F__)
  if (F >= 2) x += (vf)_mm512_permute_ps((__m512)x, 0xb1);
  if (F >= 4) x += (vf)_mm512_permute_ps((__m512)x, 0x4e);
  if (F >= 8) x += (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
  if (F >= 16) x += (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
#else
  for (int i = 0; i < VL; i += F) {
    float s = 0;
    for (int j = 0; j < F; ++j) s += x[i + j];
    for (int j = 0; j < F; ++j) x[i + j] = s;
  }
#endif
  return x;
}

// Bit r of a word of rows, for all F lanes of row r.
template <int F> INLINE uint32_t widen_bits(uint64_t word) {
  uint32_t lanes = 0;
  for (int r = 0; r < VL / F; ++r)
    if (word >> r & 1) lanes |= ((1u << F) - 1) << (r * F);
  return lanes;
}

// Fetches rows of `each` lines one after the other, a little in each of `turns` turns.
struct Drip {
  const char* const* row;
  int lines, turns, each, credit = 0, line = 0;
  INLINE Drip start(const char* const* row, int rows, int bytes, int turns) {
    int each = (bytes + 63) / 64;
    return {row, rows * each, turns, each};
  }
  __attribute__((always_inline)) void turn() {
    for (credit += lines; credit >= turns; credit -= turns) {
      prefetch(*row + line * 64);
      if (++line == each) {
        ++row;
        line = 0;
      }
    }
  }
};

template <class P, int F, int KN>
INLINE void scores_folded_of(const float* q, const float* const* k, int n, float* s, vf* top,
                             const uint64_t* seen, const char* const* ahead, int bytes) {
  vf acc[KN];
  const float* row[KN];
  UNROLL for (int j = 0; j < KN; ++j) {
    acc[j] = vf{};
    row[j] = k[j];
  }
  auto drip = Drip::start(ahead, KN, bytes, n);
  for (int t = 0; t < n; ++t) {
    if (ahead) drip.turn();
    vf x = load(q + t * VL);
    UNROLL for (int j = 0; j < KN; ++j) acc[j] = P::fma(acc[j], x, load_group<F>(row[j] + t * F));
  }
  UNROLL for (int j = 0; j < KN; ++j) {
    vf x = sum_groups<F>(acc[j]);
    if (seen) x = select(widen_bits<F>(seen[j]), x, set1(-__builtin_inff()));
    *top = vmax(*top, x);
    store(s + j * VL, x);
  }
}

// As `scores`, n vectors of folded elements; every lane of a row holds its score.
template <class P, int F>
void scores_folded(const float* q, const float* const* k, int keys, int n, float* s, float* top,
                   const uint64_t* seen, Ahead ahead) {
  vf m = load(top);
  int j = 0;
  auto run = [&](auto size) __attribute__((always_inline)) {
    constexpr int KN = decltype(size)::value;
    scores_folded_of<P, F, KN>(q, k + j, n, s + j * VL, &m, seen ? seen + j : nullptr,
                               ahead.row ? ahead.row + j : nullptr, ahead.bytes);
    j += KN;
  };
  while (j + 8 <= keys) run(Size<8>{});
  while (j < keys) run(Size<1>{});
  store(top, m);
}

template <class P, int F, int DN>
INLINE void values_folded_of(const float* p, const float* const* v, int at, int n, float* o,
                             const float* alpha, bool first, const char* const* ahead, int line,
                             int lines) {
  vf acc[DN];
  UNROLL for (int i = 0; i < DN; ++i) acc[i] = vf{};
  for (int j = 0; j < n; ++j) {
    const float* row = v[j] + at * F;
    if (ahead) {
      for (int l = line; l < line + lines; ++l)
        UNROLL for (int i = 0; i < P::PAIR; ++i) prefetch(ahead[j * P::PAIR + i] + l * 64);
    }
    vf x = load(p + j * VL);
    UNROLL for (int i = 0; i < DN; ++i) acc[i] = P::fma(acc[i], x, load_group<F>(row + i * F));
  }
  vf scale = load(alpha);
  UNROLL for (int i = 0; i < DN; ++i) {
    float* to = o + i * VL;
    store(to, first ? acc[i] : load(to) * scale + acc[i]);
  }
}

// As `values`, for `groups` vectors of F values of each row.
template <class P, int F>
void values_folded(const float* p, const float* const* v, int n, int groups, float* o,
                   const float* alpha, bool first, Ahead ahead) {
  int d = 0, total = (ahead.bytes + 63) / 64, line = 0;
  auto run = [&](auto size) __attribute__((always_inline)) {
    constexpr int DN = decltype(size)::value;
    // As many lines of each row as bring the whole row in by the time the last group is done.
    int lines = total * (d + DN) / groups - line;
    values_folded_of<P, F, DN>(p, v, d, n, o + (int64_t)d * VL, alpha, first,
                               lines > 0 ? ahead.row : nullptr, line, lines);
    d += DN;
    line += lines;
  };
  while (d + 16 <= groups) run(Size<16>{});
  while (d + 8 <= groups) run(Size<8>{});
  while (d + 4 <= groups) run(Size<4>{});
  while (d < groups) run(Size<1>{});
}

// q[e / F][r * F + e % F] from rows given as q[e][width].
INLINE void fold(const float* from, int width, int rows, int n, int f, float* to) {
  for (int t = 0; t < n / f; ++t)
    for (int r = 0; r < VL / f; ++r)
      for (int i = 0; i < f; ++i)
        to[t * VL + r * f + i] = r < rows ? from[(int64_t)(t * f + i) * width + r] : 0;
}

// The way back: to[d][width] from folded sums, and the row's state from its first lane.
INLINE void unfold(const float* from, int width, int rows, int n, int f, float* to) {
  for (int t = 0; t < n / f; ++t)
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < f; ++i) to[(int64_t)(t * f + i) * width + r] = from[t * VL + r * f + i];
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
