// Products of small blocks with the query rows in the lanes. One operand is a panel of vectors,
// the other is read one scalar at a time where it lies, so keys and values need no packing and any
// list of keys will do. Elements are 32 bits: an fp32, or a pair of bf16 for the dot instruction.
#pragma once
#include "simd.h"

namespace foveate {
namespace FOVEATE_ISA {

struct Single {  // acc += a * b
  static constexpr int PAIR = 1;
  INLINE vf fma(vf acc, vf a, vf b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
struct Pair {  // acc += a.lo * b.lo + a.hi * b.hi
  static constexpr int PAIR = 2;
  INLINE vf fma(vf acc, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// How W lanes are cut into panels of NV vectors, and how many scalars meet a panel at once: as
// many accumulators as the registers hold.
template <int W> struct Shape {
#if defined(__AVX512F__)
  static constexpr int NV = W / VL, AT_ONCE = W == 64 ? 6 : 12;
#elif defined(__AVX2__)
  static constexpr int NV = 2, AT_ONCE = 6;
#elif defined(__aarch64__)
  static constexpr int NV = 4, AT_ONCE = 6;
#else
  static constexpr int NV = 2, AT_ONCE = 6;
#endif
  static constexpr int PANEL = NV * VL;
};

template <int N> struct Size { static constexpr int value = N; };

INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// Where the next step's rows lie, to be fetched while this one is computed; null: nowhere.
struct Ahead {
  const char* const* row;
  int bytes;  // of a row
};

// Rows that lie anywhere, with those to be fetched while they are computed with (null: none).
struct Listed {
  static constexpr int IN_ORDER = 0;
  const float* const* at;
  const char* const* far;
  INLINE Listed of(const float* const* at, Ahead ahead) { return {at, ahead.row}; }
  __attribute__((always_inline)) const float* row(int j) const { return at[j]; }
  __attribute__((always_inline)) const char* next(int j) const { return far ? far[j] : (const char*)at[j]; }
  __attribute__((always_inline)) bool ahead() const { return far; }
  __attribute__((always_inline)) bool joined() const { return false; }
  __attribute__((always_inline)) Listed from(int j) const { return {at + j, far ? far + j : nullptr}; }
};

// Rows one behind the other, `stride` bytes apart; those to be fetched lie `far` bytes further. Without
// gaps they are fetched in the order of memory, which is what the processor's own reading ahead follows.
struct Lined {
  static constexpr int IN_ORDER = 0;
  const char* at;
  int64_t stride, far;
  bool dense;  // a row ends where the next one begins
  __attribute__((always_inline)) const float* row(int j) const { return (const float*)(at + j * stride); }
  __attribute__((always_inline)) const char* next(int j) const { return at + j * stride + far; }
  __attribute__((always_inline)) bool ahead() const { return true; }
  __attribute__((always_inline)) bool joined() const { return dense; }
  __attribute__((always_inline)) Lined from(int j) const { return {at + j * stride, stride, far, dense}; }
};

// Rows of about IN_ORDER elements one behind the other without gaps, read in the order of memory: a
// stream that the processor foresees, faster than it can be told. What is asked for are lines of these
// same rows, which was measured to be faster than asking for none.
template <int MOST> struct Streamed {
  static constexpr int IN_ORDER = MOST;
  const char* at;
  int64_t stride;
  __attribute__((always_inline)) const float* row(int j) const { return (const float*)(at + j * stride); }
  __attribute__((always_inline)) const char* next(int j) const { return at + j * stride; }
  __attribute__((always_inline)) bool ahead() const { return true; }
  __attribute__((always_inline)) bool joined() const { return true; }
  __attribute__((always_inline)) Streamed from(int j) const { return {at + j * stride, stride}; }
};

// Pairs of bf16 lie at any even address.
INLINE float scalar(const float* p) { float x; memcpy(&x, p, 4); return x; }

// acc[j] += sum over t < n of a[t] * b[j][t]; a is n vectors `lda` floats apart. Fetches `step` bytes
// of each row ahead for every t, from `begun` times as many on.
template <class P, int KN, int NV>
INLINE void product(vf (&acc)[KN][NV], const float* a, int64_t lda, const float* const* b, int n,
                    const char* const* ahead, int step, int begun = 0) {
  const float* row[KN];
  UNROLL for (int j = 0; j < KN; ++j) row[j] = b[j];
  int t = 0;
  for (; t + 16 <= n; t += 16) {
    if (ahead) {
      UNROLL for (int j = 0; j < KN; ++j) prefetch(ahead[j] + (begun + t) * step);
    }
    _Pragma("GCC unroll 4") for (int u = t; u < t + 16; ++u) {
      vf x[NV];
      UNROLL for (int v = 0; v < NV; ++v) x[v] = load(a + u * lda + v * VL);
      UNROLL for (int j = 0; j < KN; ++j) {
        vf y = set1(scalar(row[j] + u));
        UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = P::fma(acc[j][v], x[v], y);
      }
    }
  }
  for (; t < n; ++t) {
    vf x[NV];
    UNROLL for (int v = 0; v < NV; ++v) x[v] = load(a + t * lda + v * VL);
    UNROLL for (int j = 0; j < KN; ++j) {
      vf y = set1(scalar(row[j] + t));
      UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = P::fma(acc[j][v], x[v], y);
    }
  }
}

// KN keys of `scores`. Long rows are summed in parts of SUM elements, which keeps their rounding small.
constexpr int SUM = 256;
template <class P, int W, int KN>
INLINE void scores_of(const float* q, const float* const* k, int dim, float* s, float* top,
                      const uint64_t* seen, int shift, const char* const* ahead, int step) {
  constexpr int NV = Shape<W>::NV;
  vf acc[KN][NV];
  UNROLL for (int j = 0; j < KN; ++j) UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = vf{};
  const float* row[KN];
  UNROLL for (int j = 0; j < KN; ++j) row[j] = k[j];
  for (int done = 0; done < dim;) {
    int n = dim - done < SUM + SUM / 2 ? dim - done : SUM;
    if (done) {
      UNROLL for (int v = 0; v < NV; ++v)
        UNROLL for (int j = 0; j < KN; ++j) {
          store(s + j * W + v * VL, acc[j][v]);
          acc[j][v] = vf{};
        }
    }
    product<P, KN, NV>(acc, q + (int64_t)done * W, W, row, n, ahead, step, done);
    if (done) {
      UNROLL for (int v = 0; v < NV; ++v)
        UNROLL for (int j = 0; j < KN; ++j) acc[j][v] += load(s + j * W + v * VL);
    }
    UNROLL for (int j = 0; j < KN; ++j) row[j] += n;
    done += n;
  }
  if (seen) {
    vf hidden = set1(-__builtin_inff());
    UNROLL for (int j = 0; j < KN; ++j) {
      uint64_t word = seen[j] >> shift;
      UNROLL for (int v = 0; v < NV; ++v)
        acc[j][v] = select((uint32_t)(word >> v * VL), acc[j][v], hidden);
    }
  }
  UNROLL for (int v = 0; v < NV; ++v)
    UNROLL for (int j = 0; j < KN; ++j) store(s + j * W + v * VL, acc[j][v]);
  if (!top) return;
  UNROLL for (int v = 0; v < NV; ++v) {
    vf m = load(top + v * VL);
    UNROLL for (int j = 0; j < KN; ++j) m = vmax(m, acc[j][v]);
    store(top + v * VL, m);
  }
}

// s[j][row] = q[.][row] . k[j], -inf where hidden; top[row] = max of itself and all of them (null: not wanted).
template <class P, int W>
void scores(const float* q, const float* const* k, int keys, int dim, float* s, float* top,
            const uint64_t* seen, Ahead ahead) {
  constexpr int PANEL = Shape<W>::PANEL, AT_ONCE = Shape<W>::AT_ONCE;
  int step = ahead.row ? (ahead.bytes + dim - 1) / dim : 0;
  for (int r = 0; r < W; r += PANEL) {
    const char* const* next = r ? nullptr : ahead.row;
    int j = 0;
    auto run = [&](auto size) __attribute__((always_inline)) {
      constexpr int KN = decltype(size)::value;
      scores_of<P, W, KN>(q + r, k + j, dim, s + j * W + r, top ? top + r : nullptr, seen ? seen + j : nullptr, r,
                          next ? next + j : nullptr, step);
      j += KN;
    };
    while (j + AT_ONCE <= keys) run(Size<AT_ONCE>{});
    while (j + 4 <= keys) run(Size<4>{});
    while (j < keys) run(Size<1>{});
  }
}

// DN values of `values`.
template <class P, int W, int DN>
INLINE void values_of(const float* p, const float* const* v, int at, int n, float* o,
                      const float* alpha, bool first, const char* const* ahead, int64_t line) {
  constexpr int NV = Shape<W>::NV;
  vf acc[DN][NV];
  UNROLL for (int i = 0; i < DN; ++i) UNROLL for (int u = 0; u < NV; ++u) acc[i][u] = vf{};
  _Pragma("GCC unroll 2") for (int j = 0; j < n; ++j) {
    const float* row = v[j] + at;
    if (ahead) {
      UNROLL for (int i = 0; i < P::PAIR; ++i) prefetch(ahead[j * P::PAIR + i] + line);
    }
    vf x[NV];
    UNROLL for (int u = 0; u < NV; ++u) x[u] = load(p + j * W + u * VL);
    UNROLL for (int i = 0; i < DN; ++i) {
      vf y = set1(row[i]);
      UNROLL for (int u = 0; u < NV; ++u) acc[i][u] = P::fma(acc[i][u], x[u], y);
    }
  }
  UNROLL for (int u = 0; u < NV; ++u) {
    vf scale = load(alpha + u * VL);
    UNROLL for (int i = 0; i < DN; ++i) {
      float* to = o + i * W + u * VL;
      store(to, first ? acc[i][u] : load(to) * scale + acc[i][u]);
    }
  }
}

// o[d][row] = o[d][row] * alpha[row] + sum over j < n of p[j][row] * v[j][d]; the old o counts as
// 0 if `first`. n counts pairs of keys where the elements are pairs.
template <class P, int W>
void values(const float* p, const float* const* v, int n, int dim, float* o, const float* alpha,
            bool first, Ahead ahead) {
  constexpr int PANEL = Shape<W>::PANEL, AT_ONCE = Shape<W>::AT_ONCE;
  for (int r = 0; r < W; r += PANEL) {
    int d = 0;
    int64_t line = 0;
    auto run = [&](auto size) __attribute__((always_inline)) {
      constexpr int DN = decltype(size)::value;
      bool fetch = ahead.row && !r && line < ahead.bytes;
      values_of<P, W, DN>(p + r, v, d, n, o + (int64_t)d * W + r, alpha + r, first,
                          fetch ? ahead.row : nullptr, line);
      d += DN;
      line += 64;
    };
    // Two fours beat a six and two ones.
    while (d + AT_ONCE <= dim && dim - d != 8) run(Size<AT_ONCE>{});
    while (d + 4 <= dim) run(Size<4>{});
    while (d < dim) run(Size<1>{});
  }
}

// KN rows of `gather_rows`, NV vectors of columns.
template <class P, int KN, int NV>
INLINE void gather_rows_of(const float* a, int64_t lda, const float* b, int64_t ldb, int n,
                           float* const* c, int64_t at, float* const* far) {
  vf acc[KN][NV];
  if (far) {
    UNROLL for (int j = 0; j < KN; ++j)
      UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(far[j] + at + v * VL, 1, 2);
  }
  const float* row[KN];
  UNROLL for (int j = 0; j < KN; ++j) {
    row[j] = b + j * ldb;
    UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = vf{};
  }
  product<P, KN, NV>(acc, a, lda, row, n, nullptr, 0);
  UNROLL for (int j = 0; j < KN; ++j) {
    UNROLL for (int v = 0; v < NV; ++v) {
      float* to = c[j] + at + v * VL;
      store(to, load(to) + acc[j][v]);
    }
  }
}

// c[j][d] += sum over t < n of b[j][t] * a[t][d], for `dim` columns, a multiple of 16. Fetches the
// same columns of the rows `far`, which the next step adds to (null: none).
template <class P>
void gather_rows(const float* a, int64_t lda, const float* b, int64_t ldb, int n, int keys, int dim,
                 float* const* c, float* const* far) {
  int d = 0;
  auto columns = [&](auto most, auto vectors) __attribute__((always_inline)) {
    constexpr int KN = decltype(most)::value, NV = decltype(vectors)::value;
    int j = 0;
    auto run = [&](auto size) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      gather_rows_of<P, N, NV>(a + d, lda, b + j * ldb, ldb, n, c + j, d, far ? far + j : nullptr);
      j += N;
    };
    while (j + KN <= keys) run(Size<KN>{});
    while (j + 4 <= keys) run(Size<4>{});
    while (j < keys) run(Size<1>{});
    d += NV * VL;
  };
#if defined(__AVX512F__)
  while (d + 64 <= dim) columns(Size<6>{}, Size<4>{});
  while (d + 32 <= dim) columns(Size<12>{}, Size<2>{});
  while (d < dim) columns(Size<12>{}, Size<1>{});
#elif defined(__aarch64__)
  while (d < dim) columns(Size<6>{}, Size<4>{});
#else
  while (d < dim) columns(Size<6>{}, Size<2>{});
#endif
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
