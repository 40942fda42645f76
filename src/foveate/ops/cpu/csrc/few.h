// One step of a block of few rows, as in decoding: scores of folded.h, values of by_row.h.
#pragma once
#include "bias.h"
#include "by_row.h"
#include "folded.h"
#include "running.h"
#include "softmax.h"

namespace foveate {
namespace FOVEATE_ISA {

// Keys in a vector of scores: as many as leave room for all rows.
template <class P> INLINE int fold_for(const Call& c, int rows) {
  int f = VL;
  while (f > 1 && VL / f < rows) f /= 2;
  while (f > 1 && (elements<P>((int)c.dim) % f || c.dim % P::PAIR)) f /= 2;
  return f;
}

// Two vectors of queries to each read of a key, where the number of elements allows, the products, not
// memory, are the limit (with 16 lanes from five rows on), and 32 registers hold all sums.
template <class P> INLINE int across_for(const Call& c, int fold) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return fold < 4 && fold < VL && elements<P>((int)c.dim) % (2 * fold) == 0 ? 2 : 1;
#else
  (void)c;
  (void)fold;
  return 1;
#endif
}

// Kernel<P, T, F, NV>::of for a block's F and NV.
template <template <class, class, int, int> class Kernel, class P, class T>
INLINE auto few_for(const Running& run) {
  constexpr int F8 = VL < 8 ? VL : 8, F16 = VL < 16 ? VL : 16;
  bool two = run.across == 2;
  switch (run.fold) {
    case 1: return two ? Kernel<P, T, 1, 2>::of : Kernel<P, T, 1, 1>::of;
    case 2: return two ? Kernel<P, T, 2, 2>::of : Kernel<P, T, 2, 1>::of;
    case 4: return Kernel<P, T, 4, 1>::of;
    case 8: return Kernel<P, T, F8, 1>::of;
    default: return Kernel<P, T, F16, 1>::of;
  }
}

// Weights in place of scores, or in `weight`, as `values_by_row` takes them; returns where they are.
template <class P, class T, int F>
INLINE const float* weigh(float* score, int n, const float* top, float scale, Running& run, float* alpha,
                          float* weight) {
#if defined(__AVX512BF16__)
  if (P::PAIR == 2 && F == 1) {
    soften_pairs<VL>(score, n, top, scale, run.max, run.total, alpha, weight);
    return weight;
  }
#else
  (void)weight;
#endif
  soften<VL, sizeof(T) == 2 ? 4 : 5>(score, (n + F - 1) / F, top, scale, run.max, run.total, alpha);
  pair_weights<P>(score, (n + F - 1) / F);
  return score;
}

template <class P, class T, int F, int NV> struct FewStep {
  static void of(const Call& c, const Item& it, const Block& b, Running& run, const Step& s, int at,
                 const float* const* k, const float* const* v, float scale, float* score, float* weight,
                 float* biases, Ahead ahead_k, Ahead ahead_v) {
    alignas(64) float top[VL], alpha[VL];
    int lo = s.lo[at], hi = s.hi[at];
    if (P::PAIR == 2) lo &= ~1;
    int n = hi - lo;
    const uint64_t* seen = s.whole[at] && lo == s.lo[at] ? nullptr : s.seen[at] + lo;
    if (ahead_k.row) ahead_k.row += lo;
    if (ahead_v.row) ahead_v.row += lo;
    scores_folded<P, F, NV>(run.q, Listed::of(k + lo, ahead_k), n, elements<P>((int)c.dim) / (F * NV), score);
    if (c.bias) bias_block(c, it, b, run.query, s.key + lo, n, VL, F, biases);
    float inner = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
    settle<F>(score, n, c.softcap != 0 || c.bias, inner, (float)c.softcap, c.bias ? biases : nullptr, seen,
              top);
    const float* p = weigh<P, T, F>(score, n, top, scale, run, alpha, weight);
    values_by_row<P, F>(p, Listed::of(v + lo, ahead_v), n, (int)c.value_dim, run.o, row_floats(c), alpha,
                        run.first);
    run.first = false;
  }
};

template <class P, class T> INLINE auto few_step_for(const Running& run) {
  return few_for<FewStep, P, T>(run);
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
