// Vectors of fp32 for one instruction set. Everything is in a namespace named after that set: the
// linker must never replace a portable function by its AVX-512 twin, so no std templates either.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace foveate {
namespace FOVEATE_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf set1(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
// a where the bit is set, else b; bit i of `bits` is lane i.
INLINE vf select(uint32_t bits, vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_blend_ps((__mmask16)bits, (__m512)b, (__m512)a);
#else
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = 1 << i;
  vi all = vi{} + (int32_t)bits;
  return ((all & lane) != 0) ? a : b;
#endif
}
INLINE float sum(vf v) {
  float s = 0;
  for (int i = 0; i < VL; ++i) s += v[i];
  return s;
}

// 2^x, relative error 1.5e-7 (DEG 5) or 2.7e-6 (DEG 4); -inf gives 0.
template <int DEG> INLINE vf exp2v(vf x) {
#if defined(__AVX512F__)
  // vreduceps leaves x - floor(x); vscalefps takes the floor itself and needs no clamp.
  vf f = (vf)_mm512_reduce_ps((__m512)x, 1);
  vf p;
  if (DEG == 5) {
    p = set1(0.0018776746f) * f + set1(0.0089893397f);
    p = p * f + set1(0.0558263175f);
    p = p * f + set1(0.2401536107f);
    p = p * f + set1(0.6931530833f);
    p = p * f + set1(0.9999999404f);
  } else {
    p = set1(0.0135341678f) * f + set1(0.0520114601f);
    p = p * f + set1(0.2414427549f);
    p = p * f + set1(0.6930038333f);
    p = p * f + set1(1.0000026226f);
  }
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  vf low = set1(-126.0f);
  vi tiny = x < low;
  x = tiny ? low : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const float shifter = 12582912.0f;
  vf t = x + set1(shifter);
  vi n = (vi)t - (vi)set1(shifter);
  vf f = x - (t - set1(shifter));
  vf p;
  if (DEG == 5) {
    p = set1(0.0013276472f) * f + set1(0.0096755410f);
    p = p * f + set1(0.0555071309f);
    p = p * f + set1(0.2402212024f);
    p = p * f + set1(0.6931469440f);
    p = p * f + set1(1.0000001192f);
  } else {
    p = set1(0.0095701022f) * f + set1(0.0559178591f);
    p = p * f + set1(0.2402474433f);
    p = p * f + set1(0.6931217909f);
    p = p * f + set1(0.9999992847f);
  }
  vf r = (vf)((vi)p + (n << 23));
  return tiny ? vf{} : r;
#endif
}
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

// tanh, relative error about 5e-7: a series near 0, where 1 - 2 / (e^2x + 1) would cancel.
INLINE vf tanhv(vf x) {
  vf a = x < 0 ? -x : x;
  a = a > 12.0f ? set1(12.0f) : a;
  vf big = 1.0f - 2.0f / (exp2v<5>(a * (2 * LOG2E)) + 1.0f);
  vf t = a * a;
  vf p = t * set1(-0.0088632355f) + set1(0.0218694885f);
  p = p * t + set1(-0.0539682540f);
  p = p * t + set1(0.1333333333f);
  p = p * t + set1(-0.3333333333f);
  vf small = a + a * t * p;
  vf r = a < 0.3f ? small : big;
  return x < 0 ? -r : r;
}

// -- storage types -------------------------------------------------------------------------------
INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE float to_float(f16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, u;
  float f;
  if (rest >= 0x7c00) u = 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) u = (rest << 13) + (112u << 23);
  else {
    f = (float)rest * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
  }
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}
INLINE void from_float(float* p, float f) { *p = f; }
INLINE void from_float(bf16* p, float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) p->bits = (uint16_t)(u >> 16 | 0x40);
  else p->bits = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE void from_float(f16* p, float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) p->bits = (uint16_t)(sign | 0x7e00);
  else if (u >= 0x477ff000) p->bits = (uint16_t)(sign | 0x7c00);
  else if (u >= 0x38800000) {
    u += 0xfff + (u >> 13 & 1);
    p->bits = (uint16_t)(sign | (u - (112u << 23)) >> 13);
  } else {
    // Adding 0.5 puts the subnormal's bits, rounded to nearest even, at the low end.
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    p->bits = (uint16_t)(sign | (u - 0x3f000000));
  }
}

INLINE vf widen(const float* p) { return load(p); }
#if defined(__AVX512F__)
INLINE vf widen(const bf16* p) {
  __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_slli_epi32(w, 16);
}
INLINE vf widen(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
#elif defined(__AVX2__)
INLINE vf widen(const bf16* p) {
  __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (vf)_mm256_slli_epi32(w, 16);
}
INLINE vf widen(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
template <class T> INLINE vf widen(const T* p) {
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
}
#endif

INLINE void narrow(float* p, vf v) { store(p, v); }
INLINE void narrow(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < VL; ++i) from_float(p + i, v[i]);
#endif
}
INLINE void narrow(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) from_float(p + i, v[i]);
#endif
}
// The first n of VL elements, the rest 0.
template <class T> INLINE vf widen_part(const T* p, int n) {
  T part[VL];
  memset(part, 0, sizeof part);
  memcpy(part, p, n * sizeof(T));
  return widen(part);
}
template <class T> INLINE void narrow_part(T* p, vf v, int n) {
  T part[VL];
  narrow(part, v);
  memcpy(p, part, n * sizeof(T));
}

// Transpose VL vectors of VL lanes in place.
INLINE void transpose(vf* r) {
#if defined(__AVX512F__)
  __m512 t[16];
  UNROLL for (int i = 0; i < 16; i += 4) {
    __m512 a = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    __m512 b = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
    __m512 c = _mm512_unpacklo_ps((__m512)r[i + 2], (__m512)r[i + 3]);
    __m512 d = _mm512_unpackhi_ps((__m512)r[i + 2], (__m512)r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
    __m512 b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = (vf)_mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8] = (vf)_mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = (vf)_mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12] = (vf)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#else
  for (int i = 0; i < VL; ++i)
    for (int j = 0; j < i; ++j) {
      float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
#endif
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
