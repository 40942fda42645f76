// What the steps of a backward work on and share: blocks turned both ways, weights computed again, dS.
#pragma once
#include "forward.h"

namespace foveate {
namespace FOVEATE_ISA {

// A block of rows: queries and output gradients once with rows in lanes, once row by row.
struct Turned {
  float *q, *g;            // [element][width]
  float *q_rows, *g_rows;  // [row or pair of rows][dim, padded]
  float *dq;               // [dim][width]
  float *lse, *delta;      // [width]; lse in base 2, +inf where a row has no part in this
  int32_t* query;
  int width;
  bool first;
};

INLINE int64_t block_floats(const Call& c) {
  int64_t d = padded(c.dim, TILES ? 32 : 16), v = padded(c.value_dim, TILES ? 32 : 16);
  return ROWS * (3 * d + 2 * v + 3) + 8 * 16;
}
INLINE int64_t backward_floats(const Call& c, int64_t blocks) {
  int64_t d = padded(c.dim, TILES ? 32 : 16), v = padded(c.value_dim, TILES ? 32 : 16);
  return blocks * block_floats(c) + KEYS * ((TILES ? 4 : 2) * d + (TILES ? 3 : 1) * v) + 6 * KEYS * ROWS + 64 * 16;
}

template <class P, class T>
void turn(const Call& c, const Item& it, Block* b, Turned* t, Arena* arena) {
  constexpr bool by_tiles = TILES && P::PAIR == 2;
  int64_t d = padded(c.dim, by_tiles ? 32 : 16), dv = padded(c.value_dim, by_tiles ? 32 : 16);
  auto floats = [&](int64_t n) { return (float*)take_bytes(arena, n * 4); };
  int used = b->heads * b->rows;
  // Rows are what two of the products sum over, by tiles 32 at a time.
  t->width = used <= 16 && !by_tiles ? 16 : used <= 32 ? 32 : 64;
  t->q = floats(t->width * d);
  t->g = floats(t->width * dv);
  t->q_rows = floats(t->width * d);
  t->g_rows = floats(t->width * dv);
  t->dq = floats(t->width * d);
  t->lse = floats(t->width);
  t->delta = floats(t->width);
  t->query = (int32_t*)floats(ROWS);
  t->first = true;
  block_rows(c, it, b, t->query);
  const T *q[ROWS], *g[ROWS];
  for (int r = 0; r < t->width; ++r) {
    q[r] = g[r] = nullptr;
    t->lse[r] = __builtin_inff();
    t->delta[r] = 0;
    if (r >= used || t->query[r] < 0) continue;
    int64_t head = b->head0 + r / b->rows, i = t->query[r];
    int64_t at = (it.batch * c.heads + head) * c.q_len + i;
    if (c.lse[at] == -__builtin_inff()) continue;
    q[r] = row_at<T>(c.query, it.batch, head, i);
    t->lse[r] = c.lse[at] * LOG2E;
    float delta = c.grad_lse ? -c.grad_lse[at] : 0;
    if (c.grad_out.data) {
      g[r] = row_at<T>(c.grad_out, it.batch, head, i);
      const T* o = row_at<T>(c.out, it.batch, head, i);
      vf sums = vf{};
      for (int64_t e = 0; e < c.value_dim; e += VL)
        sums += element_block<Single>(o, (int)e, (int)c.value_dim) *
                element_block<Single>(g[r], (int)e, (int)c.value_dim);
      delta += sum(sums);
    }
    t->delta[r] = delta;
  }
  rows_to_lanes<P>(q, t->width, (int)c.dim, t->q);
  rows_to_lanes<P>(g, t->width, (int)c.value_dim, t->g);
  if (by_tiles) {
    int64_t n = elements<P>((int)c.dim), m = elements<P>((int)c.value_dim);
    memset(t->q + t->width * n, 0, sizeof(float) * t->width * (d / 2 - n));
    memset(t->g + t->width * m, 0, sizeof(float) * t->width * (dv / 2 - m));
  }
  auto by_row = [&](const T* const* row, int dim, int64_t stride, float* to) {
#if defined(__AVX512BF16__)
    if (P::PAIR == 2) return interleave_rows((const bf16* const*)row, t->width, dim, stride, to);
#endif
    for (int r = 0; r < t->width; ++r)
      for (int e = 0; e < stride; e += VL)
        store(to + r * stride + e, row[r] ? element_block<Single>(row[r], e, dim) : vf{});
  };
  by_row(q, (int)c.dim, d, t->q_rows);
  by_row(g, (int)c.value_dim, dv, t->g_rows);
}

// What one step needs of its keys, and the buffers it works in.
struct Keys {
  const float *k[KEYS], *v[KEYS];  // rows of elements
  const float* k_values[KEYS];     // rows, or interleaved pairs of rows, for dQ
  float *dk[KEYS], *dv[KEYS];
  float *far_dk[KEYS], *far_dv[KEYS];  // sums that the next step adds to, to be fetched
  const int32_t* key;
  float *p, *s, *slope, *bias, *packed_p, *packed_s, *pairs;
};

// Weights in place of scores; with a softcap, 1 - tanh^2 in `slope`.
template <int W, int DEG>
INLINE void reweigh(const Call& c, const float* lse, const float* bias, const uint64_t* seen, int n,
                    float* s, float* slope) {
  float inner = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
  float cap = (float)c.softcap * LOG2E;
  for (int r = 0; r < W; r += VL) {
    vf row = load(lse + r);
    for (int j = 0; j < n; ++j) {
      vf x = load(s + j * W + r);
      if (cap != 0) {
        vf t = tanhv(x * inner);
        store(slope + j * W + r, 1.0f - t * t);
        x = t * cap;
        if (bias) x += load(bias + j * W + r) * LOG2E;
        x = x - row;
      } else if (bias) {
        x = x * inner + (load(bias + j * W + r) * LOG2E - row);
      } else {
        x = x * inner - row;
      }
      x = exp2v<DEG>(x);
      if (seen) x = select((uint32_t)(seen[j] >> r), x, vf{});
      store(s + j * W + r, x);
    }
  }
}

// dS = P (dO V^T - delta) slope scale in place of dO V^T, of n keys, `real` of them there. The bias takes
// its gradient on the way.
template <int W>
INLINE void grade(const Call& c, const Block& b, const Turned& t, const int32_t* key, int real, int n,
                  const uint64_t* seen, const Keys& keys, const Sums& sums) {
  bool slopes = c.softcap != 0, biased = sums.bias != nullptr;
  float *p = keys.p, *s = keys.s;
  vf scale = set1((float)c.scale);
  for (int r = 0; r < W; r += VL) {
    vf delta = load(t.delta + r);
    for (int j = 0; j < n; ++j) {
      vf x = load(p + j * W + r) * (load(s + j * W + r) - delta);
      if (seen) x = select((uint32_t)(seen[j] >> r), x, vf{});
      store(s + j * W + r, biased ? x : slopes ? x * load(keys.slope + j * W + r) * scale : x * scale);
    }
  }
  if (!biased) return;
  add_bias(c, b, t.query, key, real, W, s, sums);
  for (int i = 0; i < n * W; i += VL)
    store(s + i, slopes ? load(s + i) * load(keys.slope + i) * scale : load(s + i) * scale);
}

#if defined(__AVX512BF16__)
// Weights and dS as bf16: side by side along rows, and dS by pairs of keys.
template <int W> INLINE void pack_pairs(const Keys& keys, int n) {
  const float *p = keys.p, *s = keys.s;
  for (int j = 0; j < n; ++j)
    for (int r = 0; r < W; r += VL) {
      narrow((bf16*)keys.packed_p + j * W + r, load(p + j * W + r));
      narrow((bf16*)keys.packed_s + j * W + r, load(s + j * W + r));
    }
  for (int j = 0; j < n; j += 2)
    for (int r = 0; r < W; r += VL)
      store(keys.pairs + j / 2 * W + r,
            interleave(load(s + j * W + r), j + 1 < n ? load(s + (j + 1) * W + r) : vf{}));
}
#endif

}  // namespace FOVEATE_ISA
}  // namespace foveate
