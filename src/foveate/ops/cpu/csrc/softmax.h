// The softmax step between the two products, rows in lanes; scores are in units of log 2.
#pragma once
#include "call.h"
#include "micro.h"
#include "stream.h"

namespace foveate {
namespace FOVEATE_ISA {

// Rows start here, not at -inf: differences of maxima stay numbers, and a row that has seen
// nothing ends with a total of 0.
constexpr float LOWEST = -1e30f;

// 2^(old - now), and exactly 1 where the maximum stayed: the polynomial's 1.00000007 at 0 would grow
// with the number of steps, and with it the lse of long rows.
INLINE vf decay(vf old, vf now) { return old == now ? set1(1.0f) : exp2v<5>(old - now); }

// p = 2^(c s - max) in place of s, with the running max, total and alpha = 2^(old max - max).
// `top` is the largest s of this step; c > 0.
template <int W, int DEG>
INLINE void soften(float* s, int keys, const float* top, float c, float* max, float* total,
                   float* alpha) {
  for (int r = 0; r < W; r += VL) {
    vf old = load(max + r);
    vf now = vmax(old, load(top + r) * c);
    vf a = decay(old, now);
    vf t0 = vf{}, t1 = vf{};
    int j = 0;
    for (; j + 2 <= keys; j += 2) {
      vf x = exp2v<DEG>(load(s + j * W + r) * c - now);
      vf y = exp2v<DEG>(load(s + (j + 1) * W + r) * c - now);
      store(s + j * W + r, x);
      store(s + (j + 1) * W + r, y);
      t0 += x;
      t1 += y;
    }
    if (j < keys) {
      vf x = exp2v<DEG>(load(s + j * W + r) * c - now);
      store(s + j * W + r, x);
      t0 += x;
    }
    store(max + r, now);
    store(alpha + r, a);
    store(total + r, load(total + r) * a + t0 + t1);
  }
}

#if defined(__AVX512BF16__)
// (a, b) rounded to bf16, lane by lane side by side: a in the low half.
INLINE vf interleave(vf a, vf b) {
  static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  return (vf)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}

// As `soften`, but p goes out as bf16 pairs of keys, [pair][row]; an odd last key meets a 0.
template <int W>
INLINE void soften_pairs(const float* s, int keys, const float* top, float c, float* max,
                         float* total, float* alpha, float* p) {
  for (int r = 0; r < W; r += VL) {
    vf old = load(max + r);
    vf now = vmax(old, load(top + r) * c);
    vf a = decay(old, now);
    vf t0 = vf{}, t1 = vf{};
    int j = 0;
    for (; j + 2 <= keys; j += 2) {
      vf x = exp2v<4>(load(s + j * W + r) * c - now);
      vf y = exp2v<4>(load(s + (j + 1) * W + r) * c - now);
      store(p + j / 2 * W + r, interleave(x, y));
      t0 += x;
      t1 += y;
    }
    if (j < keys) {
      vf x = exp2v<4>(load(s + j * W + r) * c - now);
      store(p + j / 2 * W + r, interleave(x, vf{}));
      t0 += x;
    }
    store(max + r, now);
    store(alpha + r, a);
    store(total + r, load(total + r) * a + t0 + t1);
  }
}
#endif

// s becomes log2 e * (softcap * tanh(c s) + bias), or log2 e * (...) of what there is of it, -inf
// where hidden; c is such that c s is what goes into the tanh, or the scaled score in base 2.
template <int W>
INLINE void adjust(float* s, int keys, float c, float cap, const float* bias, const uint64_t* seen,
                   float* top) {
  for (int r = 0; r < W; r += VL) {
    vf m = load(top + r);
    for (int j = 0; j < keys; ++j) {
      vf x = load(s + j * W + r) * c;
      if (cap != 0) x = tanhv(x) * (cap * LOG2E);
      if (bias) x += load(bias + j * W + r) * LOG2E;
      if (seen) x = select((uint32_t)(seen[j] >> r), x, set1(-__builtin_inff()));
      m = vmax(m, x);
      store(s + j * W + r, x);
    }
    store(top + r, m);
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
