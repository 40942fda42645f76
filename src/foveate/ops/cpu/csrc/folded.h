// Scores of blocks of few rows, as in decoding: a vector holds `VL / F` rows times F neighbouring
// elements of each, so that no lane idles. Lane r * F + i is element i of row r; keys are read F
// elements at a time, repeated for every row.
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

// Each lane gets the one S away.
template <int S> INLINE vf swap(vf x) {
#if defined(__AVX512F__)
  __m512 y = (__m512)x;
  return (vf)(S == 1   ? _mm512_permute_ps(y, 0xb1)
              : S == 2 ? _mm512_permute_ps(y, 0x4e)
              : S == 4 ? _mm512_shuffle_f32x4(y, y, 0xb1)
                       : _mm512_shuffle_f32x4(y, y, 0x4e));
#else
  vf y;
  for (int i = 0; i < VL; ++i) y[i] = x[(i ^ S) % VL];
  return y;
#endif
}

// Lanes whose bit S is clear get a + a of the lane S away, the others get b's.
template <int S> INLINE vf meet(vf a, vf b) {
  constexpr uint32_t first = S == 1 ? 0x5555 : S == 2 ? 0x3333 : S == 4 ? 0x0f0f : 0x00ff;
  return select(first, a, b) + swap<S>(select(first, b, a));
}

// Sums over each row's F lanes of F vectors, side by side: lane r * F + i is row r's sum of x[i].
template <int F> INLINE vf sum_groups(vf* x) {
  if (F >= 2) UNROLL for (int i = 0; i < F; i += 2) x[i] = meet<1>(x[i], x[i + 1]);
  if (F >= 4) UNROLL for (int i = 0; i < F; i += 4) x[i] = meet<2>(x[i], x[i + 2]);
  if (F >= 8) UNROLL for (int i = 0; i < F; i += 8) x[i] = meet<4>(x[i], x[i + 4]);
  if (F >= 16) x[0] = meet<8>(x[0], x[8]);
  return x[0];
}

// Every lane gets the largest of its row's F.
template <int F> INLINE vf max_groups(vf x) {
  if (F >= 2) x = vmax(x, swap<1>(x));
  if (F >= 4) x = vmax(x, swap<2>(x));
  if (F >= 8) x = vmax(x, swap<4>(x));
  if (F >= 16) x = vmax(x, swap<8>(x));
  return x;
}

// The lanes that see: bit r of word i of F, for lane r * F + i; nobody sees beyond `words`.
template <int F> INLINE uint32_t lanes_seen(const uint64_t* word, int words) {
  uint32_t lanes = 0;
  for (int i = 0; i < F && i < words; ++i)
    for (int r = 0; r < VL / F; ++r) lanes |= (uint32_t)(!word || word[i] >> r & 1) << (r * F + i);
  return lanes;
}

// KN keys of `scores_folded`. With every line that is read goes the same one of a row ahead.
template <class P, int F, int KN, class Keys>
INLINE void scores_folded_of(const float* q, Keys k, int left, int n, float* s) {
  constexpr int LINE = 16 / F > 0 ? 16 / F : 1;  // vectors of q that meet one line of a key
  vf acc[KN];
  auto last = [&](int j) __attribute__((always_inline)) { return j < left ? j : left - 1; };
  UNROLL for (int j = 0; j < KN; ++j) acc[j] = vf{};
  if (F >= 8) {  // memory is the limit: key by key, in the order in which they lie
    UNROLL for (int j = 0; j < KN; ++j) {
      const float* row = k.row(last(j));
      const char* next = k.next(last(j));
      auto add = [&](int t) __attribute__((always_inline)) {
        if (t % LINE == 0) prefetch(next + t * F * 4);
        acc[j] = P::fma(acc[j], load(q + t * VL), load_group<F>(row + t * F));
      };
      int t = 0;
      for (; t + 4 <= n; t += 4) UNROLL for (int u = 0; u < 4; ++u) add(t + u);
      for (; t < n; ++t) add(t);
    }
  } else {
    const float* row[KN];
    UNROLL for (int j = 0; j < KN; ++j) row[j] = k.row(last(j));
    auto add = [&](int t) __attribute__((always_inline)) {
      vf x = load(q + t * VL);
      UNROLL for (int j = 0; j < KN; ++j) acc[j] = P::fma(acc[j], x, load_group<F>(row[j] + t * F));
    };
    int t = 0;
    for (; t + LINE <= n; t += LINE) {
      UNROLL for (int j = 0; j < KN; ++j) prefetch(k.next(last(j)) + t * F * 4);
      UNROLL for (int u = 0; u < LINE; ++u) add(t + u);
    }
    for (; t < n; ++t) add(t);
  }
  UNROLL for (int j = 0; j < KN; j += F) store(s + j / F * VL, sum_groups<F>(acc + j));
}

// s[key / F][row * F + key % F] = q[row] . k[key], of n vectors of folded elements. Keys beyond the
// last fill up its vector with what `settle` hides.
template <class P, int F, class Keys>
INLINE void scores_folded(const float* q, Keys k, int keys, int n, float* s) {
  constexpr int KN = F > 8 ? F : 8;
  int j = 0;
  for (; j + KN <= keys; j += KN) scores_folded_of<P, F, KN>(q, k.from(j), KN, n, s + j / F * VL);
  if (j < keys) scores_folded_of<P, F, KN>(q, k.from(j), keys - j, n, s + j / F * VL);
}

// Scores made ready for the softmax: c, cap and bias as in `adjust`, if so wanted; -inf where hidden;
// top = the largest of each row.
template <int F>
INLINE void settle(float* s, int keys, bool adjusted, float c, float cap, const float* bias,
                   const uint64_t* seen, float* top) {
  vf m = set1(-__builtin_inff());
  for (int j = 0; j < keys; j += F) {
    float* at = s + j / F * VL;
    vf x = load(at);
    if (adjusted) {
      x = x * c;
      if (cap != 0) x = tanhv(x) * (cap * LOG2E);
      if (bias) x += load(bias + j / F * VL) * LOG2E;
    }
    if (seen || keys - j < F)
      x = select(lanes_seen<F>(seen ? seen + j : nullptr, keys - j), x, set1(-__builtin_inff()));
    m = vmax(m, x);
    store(at, x);
  }
  store(top, max_groups<F>(m));
}

// q[e / F][r * F + e % F] from rows given as q[e][width].
INLINE void fold(const float* from, int width, int rows, int n, int f, float* to) {
  for (int t = 0; t < n / f; ++t)
    for (int r = 0; r < VL / f; ++r)
      for (int i = 0; i < f; ++i)
        to[t * VL + r * f + i] = r < rows ? from[(int64_t)(t * f + i) * width + r] : 0;
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
