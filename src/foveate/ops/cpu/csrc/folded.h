// Scores of blocks of few rows, as in decoding: NV vectors hold VL / F rows with E = F * NV neighbouring
// elements of each, so that no lane idles. Lane r * E + i of vector v is element i of row r * NV + v;
// keys are read E elements at a time, repeated for every row, once for all NV vectors. A vector of
// scores has F keys: lane r * F + i is row r and key i.
#pragma once
#include "micro.h"
#include "pack.h"

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

// KN keys of `scores_folded`. With every line that is read goes one of the rows ahead.
template <class P, int F, int NV, int KN, class Keys>
INLINE void scores_folded_of(const float* q, Keys k, int left, int n, float* s) {
  constexpr int E = F * NV, LINE = 16 / E > 0 ? 16 / E : 1;  // steps of q that meet one line of a key
  vf acc[KN][NV];
  auto last = [&](int j) __attribute__((always_inline)) { return j < left ? j : left - 1; };
  UNROLL for (int j = 0; j < KN; ++j) UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = vf{};
  if (F >= 8) {  // memory is the limit: key by key, in the order in which they lie
    UNROLL for (int j = 0; j < KN; ++j) {
      const float* row = k.row(last(j));
      const char* next = k.next(last(j));
      auto add = [&](int t) __attribute__((always_inline)) {
        if (t % LINE == 0) prefetch(next + t * E * 4);
        acc[j][0] = P::fma(acc[j][0], load(q + t * VL), load_group<E>(row + t * E));
      };
      int t = 0;
      for (; t + 4 <= n; t += 4) UNROLL for (int u = 0; u < 4; ++u) add(t + u);
      for (; t < n; ++t) add(t);
    }
  } else if (Keys::IN_ORDER) {  // nearly so: 512 bytes of keys abreast, sums kept apart by steps
    constexpr int ABREAST = Keys::IN_ORDER ? 128 * P::PAIR / Keys::IN_ORDER : 1, APART = 8 / (ABREAST * NV);
    UNROLL for (int g = 0; g < KN; g += ABREAST) {
      vf part[APART][ABREAST][NV];
      const float* row[ABREAST];
      UNROLL for (int i = 0; i < APART; ++i)
        UNROLL for (int j = 0; j < ABREAST; ++j) UNROLL for (int v = 0; v < NV; ++v) part[i][j][v] = vf{};
      UNROLL for (int j = 0; j < ABREAST; ++j) row[j] = k.row(last(g + j));
      auto add = [&](int t, int i) __attribute__((always_inline)) {
        vf x[NV];
        UNROLL for (int v = 0; v < NV; ++v) x[v] = load(q + (t * NV + v) * VL);
        UNROLL for (int j = 0; j < ABREAST; ++j) {
          if (t % LINE == 0) prefetch(k.next(last(g + j)) + t * E * 4);
          vf y = load_group<E>(row[j] + t * E);
          UNROLL for (int v = 0; v < NV; ++v) part[i][j][v] = P::fma(part[i][j][v], x[v], y);
        }
      };
      int t = 0;
      for (; t + 8 <= n; t += 8) UNROLL for (int u = 0; u < 8; ++u) add(t + u, u % APART);
      for (; t < n; ++t) add(t, 0);
      UNROLL for (int j = 0; j < ABREAST; ++j)
        UNROLL for (int v = 0; v < NV; ++v) {
          UNROLL for (int i = 1; i < APART; ++i) part[0][j][v] += part[i][j][v];
          acc[g + j][v] = part[0][j][v];
        }
    }
  } else {
    const float* row[KN];
    UNROLL for (int j = 0; j < KN; ++j) row[j] = k.row(last(j));
    auto add = [&](int t) __attribute__((always_inline)) {
      vf x[NV];
      UNROLL for (int v = 0; v < NV; ++v) x[v] = load(q + (t * NV + v) * VL);
      UNROLL for (int j = 0; j < KN; ++j) {
        vf y = load_group<E>(row[j] + t * E);
        UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = P::fma(acc[j][v], x[v], y);
      }
    };
    int t = 0;
    for (; t + LINE <= n; t += LINE) {
      if (k.joined()) {
        const char* next = k.next(0) + t / LINE * KN * 64;
        UNROLL for (int j = 0; j < KN; ++j) prefetch(next + j * 64);
      } else {
        UNROLL for (int j = 0; j < KN; ++j) prefetch(k.next(last(j)) + t * E * 4);
      }
      UNROLL for (int u = 0; u < LINE; ++u) add(t + u);
    }
    for (; t < n; ++t) add(t);
  }
  UNROLL for (int j = 0; j < KN; j += F) {
    vf x[E];
    UNROLL for (int i = 0; i < E; ++i) x[i] = acc[j + i % F][i / F];
    store(s + j / F * VL, sum_groups<E>(x));
  }
}

// s[key / F][row * F + key % F] = q[row] . k[key], of n steps of NV vectors of folded elements. Keys
// beyond the last fill up its vector with what `settle` hides.
template <class P, int F, int NV, class Keys>
INLINE void scores_folded(const float* q, Keys k, int keys, int n, float* s) {
  constexpr int KN = F > 8 ? F : 8;
  int j = 0;
  for (; j + KN <= keys; j += KN) scores_folded_of<P, F, NV, KN>(q, k.from(j), KN, n, s + j / F * VL);
  if (j < keys) scores_folded_of<P, F, NV, KN>(q, k.from(j), keys - j, n, s + j / F * VL);
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
    if (adjusted || seen || keys - j < F) store(at, x);
  }
  store(top, max_groups<F>(m));
}

// q[step][v][r * E + i] = element step * E + i of row r * nv + v, from VL / f rows (null: zeros).
template <class P, class T, int E>
INLINE void fold_by(const T* const* row, int dim, int nv, float* to) {
  for (int r = 0; r < VL / E * nv; ++r)
    for (int at = 0, n = elements<P>(dim); at < n; at += VL) {
      alignas(64) float x[VL];
      store(x, row[r] ? element_block<P>(row[r], at, dim) : vf{});
      float* q = to + ((int64_t)(at / E) * nv + r % nv) * VL + r / nv * E;
      for (int i = 0; i < VL && at + i < n; i += E, q += nv * VL) memcpy(q, x + i, E * 4);
    }
}
template <class P, class T> INLINE void fold(const T* const* row, int dim, int f, int nv, float* to) {
  switch (f * nv) {
    case 1: return fold_by<P, T, 1>(row, dim, nv, to);
    case 2: return fold_by<P, T, 2>(row, dim, nv, to);
    case 4: return fold_by<P, T, 4>(row, dim, nv, to);
    case 8: return fold_by<P, T, VL < 8 ? VL : 8>(row, dim, nv, to);
    default: return fold_by<P, T, VL>(row, dim, nv, to);
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
