// Backward: scores and weights are computed again from the lse, then
//   dV = P^T dO,  dS = P (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q,
//   delta = rowsum(dO O) - dlse.
// An item adds to fp32 sums of its keys, which no other thread touches meanwhile.
#pragma once
#include <math.h>

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

#if defined(__AMX_BF16__)
// `reweigh`, `grade` and `pack_pairs` in one, where nothing is added to or done with scores. `n` is even.
template <int W>
INLINE void grade_tiles(const Call& c, const Turned& t, int n, const uint64_t* seen, const Keys& keys) {
  vf inner = set1((float)(c.scale * LOG2E)), scale = set1((float)c.scale);
  for (int r = 0; r < W; r += VL) {
    vf row = load(t.lse + r), delta = load(t.delta + r);
    for (int j = 0; j < n; j += 2) {
      vf s[2];
      UNROLL for (int i = 0; i < 2; ++i) {
        int at = (j + i) * W + r;
        vf p = exp2v<4>(load(keys.p + at) * inner - row), x = p * (load(keys.s + at) - delta) * scale;
        if (seen) {
          p = select((uint32_t)(seen[j + i] >> r), p, vf{});
          x = select((uint32_t)(seen[j + i] >> r), x, vf{});
        }
        narrow((bf16*)keys.packed_p + at, p);
        narrow((bf16*)keys.packed_s + at, x);
        s[i] = x;
      }
      store(keys.pairs + j / 2 * W + r, interleave(s[0], s[1]));
    }
  }
}

// What the steps of an item by tiles share: keys and values by pairs, keys turned, and the sums of the step's
// dK and dV, rows of d and dv floats.
struct TileStep {
  Matrix k, v, k_turned, dk, dv;
};

// As `backward_step` by tiles.
template <int W>
void backward_tiles(const Call& c, const Item& it, const Block& b, Turned& t, const Step& step, int at,
                    const TileStep& m, const Keys& keys, const Sums& sums) {
  TileKeys range;
  range.take(step, at);
  int lo = range.lo, n = range.n, d = (int)padded(c.dim, 16), dv = (int)padded(c.value_dim, 16);
  const uint64_t* seen = range.words();
  auto from = [](Matrix x, int row) { return Matrix{x.at + row * x.stride, x.stride}; };
  tiles(from(m.k, lo), {t.q, W}, n, W, (int)m.k.stride / 16, {keys.p, W}, false);
  tiles(from(m.v, lo), {t.g, W}, n, W, (int)m.v.stride / 16, {keys.s, W}, false);
  if (c.bias || c.softcap != 0) {
    if (c.bias) {
      bias_block(c, it, b, t.query, step.key + lo, range.real, W, 1, keys.bias);
      memset(keys.bias + range.real * W, 0, sizeof(float) * (n - range.real) * W);
    }
    reweigh<W, 4>(c, t.lse, c.bias ? keys.bias : nullptr, seen, n, keys.p, keys.slope);
    grade<W>(c, b, t, step.key + lo, range.real, n, seen, keys, sums);
    pack_pairs<W>(keys, n);
  } else {
    grade_tiles<W>(c, t, n, seen, keys);
  }
  Matrix p = {keys.packed_p, W / 2}, s = {keys.packed_s, W / 2};
  tiles(p, {t.g_rows, m.dv.stride}, n, dv, W / 32, from(m.dv, lo), true);
  tiles(s, {t.q_rows, m.dk.stride}, n, d, W / 32, from(m.dk, lo), true);
  tiles({m.k_turned.at + lo / 2, m.k_turned.stride}, {keys.pairs, W}, d, W, n / TILE_KEYS, {t.dq, W}, !t.first);
  t.first = false;
}
#endif

template <class P, class T, int W>
void backward_step(const Call& c, const Item& it, const Block& b, Turned& t, const Step& step, int at,
                   const Keys& keys, const Sums& sums, Ahead ahead_k, Ahead ahead_v) {
  constexpr int DEG = sizeof(T) == 2 ? 4 : 5;
  int lo = step.lo[at], hi = step.hi[at];
  if (P::PAIR == 2) lo &= ~1;
  int n = hi - lo;
  bool far = ahead_k.row;
  const uint64_t* seen = step.whole[at] && lo == step.lo[at] ? nullptr : step.seen[at] + lo;
  if (ahead_k.row) ahead_k.row += lo;
  if (ahead_v.row) ahead_v.row += lo;
  float *p = keys.p, *s = keys.s;
  scores<P, W>(t.q, keys.k + lo, n, elements<P>((int)c.dim), p, nullptr, nullptr, ahead_k);
  if (c.bias) bias_block(c, it, b, t.query, keys.key + lo, n, W, 1, keys.bias);
  reweigh<W, DEG>(c, t.lse, c.bias ? keys.bias : nullptr, seen, n, p, keys.slope);
  scores<P, W>(t.g, keys.v + lo, n, elements<P>((int)c.value_dim), s, nullptr, nullptr, ahead_v);
  grade<W>(c, b, t, keys.key + lo, n, n, seen, keys, sums);
  alignas(64) float ones[W];
  for (int r = 0; r < W; ++r) ones[r] = 1;
  int d = (int)padded(c.dim, 16), dv = (int)padded(c.value_dim, 16);
  float* const* far_dk = far ? keys.far_dk + lo : nullptr;
  float* const* far_dv = far ? keys.far_dv + lo : nullptr;
  Ahead none = {nullptr, 0};
#if defined(__AVX512BF16__)
  if (P::PAIR == 2) {
    pack_pairs<W>(keys, n);
    gather_rows<P>(t.g_rows, dv, keys.packed_p, W / 2, W / 2, n, dv, keys.dv + lo, far_dv);
    gather_rows<P>(t.q_rows, d, keys.packed_s, W / 2, W / 2, n, d, keys.dk + lo, far_dk);
    values<P, W>(keys.pairs, keys.k_values + lo / 2, (n + 1) / 2, (int)c.dim, t.dq, ones, t.first, none);
    t.first = false;
    return;
  }
#endif
  gather_rows<P>(t.g_rows, dv, p, W, W, n, dv, keys.dv + lo, far_dv);
  gather_rows<P>(t.q_rows, d, s, W, W, n, d, keys.dk + lo, far_dk);
  values<P, W>(s, keys.k_values + lo, n, (int)c.dim, t.dq, ones, t.first, none);
  t.first = false;
}

// to += from, whole vectors; fetches as much from `far` (null: nothing).
INLINE void add_row(const float* from, int dim, float* to, const float* far) {
  for (int e = 0; e < dim; e += VL) {
    if (far) __builtin_prefetch(far + e, 1, 2);
    store(to + e, load(to + e) + load(from + e));
  }
}

// Bring a block's dQ home.
template <class T> INLINE void finish_queries(const Call& c, const Item& it, const Block& b, Turned& t,
                                              const Sums& sums) {
  alignas(64) float ones[ROWS];
  if (t.first) memset(t.dq, 0, sizeof(float) * t.width * c.dim);
  T* to[ROWS];
  float* wide[ROWS];
  for (int r = 0; r < t.width; ++r) {
    ones[r] = 1;
    to[r] = nullptr;
    wide[r] = nullptr;
    if (r >= b.heads * b.rows || t.query[r] < 0) continue;
    int64_t head = b.head0 + r / b.rows, i = t.query[r];
    if (sums.query) wide[r] = sums.query + ((it.batch * c.heads + head) * c.q_len + i) * c.dim;
    else to[r] = (T*)row_at<T>(c.grad_query, it.batch, head, i);
  }
  if (!sums.query) return lanes_to_rows(t.dq, t.width, (int)c.dim, ones, to);
  for (int r = 0; r < t.width; ++r)
    for (int e = 0; wide[r] && e < c.dim; ++e) wide[r][e] += t.dq[e * t.width + r];
}

template <class P, class T>
void backward_item(const Call& c, const Item& it, Arena* arena, const Sums& sums) {
  constexpr bool by_tiles = TILES && P::PAIR == 2;
  int64_t d = padded(c.dim, by_tiles ? 32 : 16), dv = padded(c.value_dim, by_tiles ? 32 : 16);
  arena->used = 0;
  auto floats = [&](int64_t n) { return (float*)take_bytes(arena, n * 4); };
  Block block[BLOCKS];
  Turned turned[BLOCKS];
  int blocks = make_blocks(c, it, block);
  int64_t kv_head = it.head0 / (c.heads / c.kv_heads);
  for (int i = 0; i < blocks; ++i) turn<P, T>(c, it, &block[i], &turned[i], arena);
  bool wide = sizeof(T) == 2 && P::PAIR == 1, pairs = P::PAIR == 2 && !by_tiles;
  bool copy_k = wide || (pairs && c.dim % 2), copy_v = wide || (pairs && c.value_dim % 2);
  float* k = copy_k ? floats(KEYS * d) : nullptr;
  float* v = copy_v ? floats(KEYS * dv) : nullptr;
  float* k_pairs = pairs ? floats(KEYS / 2 * d) : nullptr;
#if defined(__AMX_BF16__)
  TileUnit unit(by_tiles);
  TileStep tile;
  if (by_tiles) {
    tile = {{floats(KEYS * d / 2), d / 2}, {floats(KEYS * dv / 2), dv / 2}, {floats(d * KEYS / 2), KEYS / 2},
            {floats(KEYS * d), d}, {floats(KEYS * dv), dv}};
  }
#endif
  Keys keys;
  keys.p = floats(KEYS * ROWS);
  keys.s = floats(KEYS * ROWS);
  keys.slope = c.softcap != 0 ? floats(KEYS * ROWS) : nullptr;
  keys.bias = c.bias ? floats(KEYS * ROWS) : nullptr;
  if (P::PAIR == 2) {
    keys.packed_p = floats(KEYS * ROWS / 2);
    keys.packed_s = floats(KEYS * ROWS / 2);
    keys.pairs = floats(KEYS * ROWS / 2);
  }
  Stream stream;
  stream.start(c, it, block, blocks);
  Step step[2];
  const T *k_row[2][KEYS], *v_row[2][KEYS];
  int now = 0;
  bool more = stream.next(&step[0]);
  if (more) {
    point(c.key, it.batch, kv_head, step[0], k_row[0]);
    point(c.value, it.batch, kv_head, step[0], v_row[0]);
  }
  while (more) {
    const Step& s = step[now];
    int then = 1 - now;
    more = stream.next(&step[then]);
    Ahead ahead_k = {nullptr, 0}, ahead_v = {nullptr, 0};
    if (more) {
      point(c.key, it.batch, kv_head, step[then], k_row[then]);
      point(c.value, it.batch, kv_head, step[then], v_row[then]);
      for (int j = step[then].n; j < KEYS; ++j) {
        k_row[then][j] = k_row[then][0];
        v_row[then][j] = v_row[then][0];
      }
      for (int j = 0; j < KEYS; ++j) {
        int64_t key = step[then].key[j < step[then].n ? j : 0];
        keys.far_dk[j] = sums.key + key * sums.key_row;
        keys.far_dv[j] = sums.value + key * sums.value_row;
      }
      ahead_k = {(const char* const*)k_row[then], (int)(c.dim * sizeof(T))};
      ahead_v = {(const char* const*)v_row[then], (int)(c.value_dim * sizeof(T))};
    }
    if (copy_k) copy_rows<P>(k_row[now], s.n, (int)c.dim, d, k);
    if (copy_v) copy_rows<P>(v_row[now], s.n, (int)c.value_dim, dv, v);
#if defined(__AVX512BF16__)
    if (pairs) interleave_rows((const bf16* const*)k_row[now], s.n, (int)c.dim, d, k_pairs);
#endif
#if defined(__AMX_BF16__)
    if constexpr (by_tiles) {
      copy_pairs(k_row[now], s.n, (int)c.dim, d / 2, tile.k.at, more ? k_row[then] : nullptr);
      copy_pairs(v_row[now], s.n, (int)c.value_dim, dv / 2, tile.v.at, more ? v_row[then] : nullptr);
      turn_pairs(k_row[now], s.n, (int)c.dim, KEYS / 2, tile.k_turned.at, nullptr);
      memset(tile.dk.at, 0, sizeof(float) * padded(s.n, TILE_KEYS) * d);
      memset(tile.dv.at, 0, sizeof(float) * padded(s.n, TILE_KEYS) * dv);
      for (int i = 0; i < blocks; ++i) {
        if (s.lo[i] >= s.hi[i]) continue;
        auto step_of = turned[i].width == 64 ? backward_tiles<64> : backward_tiles<32>;
        step_of(c, it, block[i], turned[i], s, i, tile, keys, sums);
      }
      for (int j = 0; j < s.n; ++j) {
        float *dk = sums.key + s.key[j] * sums.key_row, *dv_to = sums.value + s.key[j] * sums.value_row;
        add_row(tile.dk.at + j * d, (int)padded(c.dim, 16), dk, more ? keys.far_dk[j] : nullptr);
        add_row(tile.dv.at + j * dv, (int)padded(c.value_dim, 16), dv_to, more ? keys.far_dv[j] : nullptr);
      }
      now = then;
      continue;
    }
#endif
    keys.key = s.key;
    for (int j = 0; j < s.n; ++j) {
      keys.k[j] = copy_k ? k + j * d : (const float*)k_row[now][j];
      keys.v[j] = copy_v ? v + j * dv : (const float*)v_row[now][j];
      keys.k_values[j] = P::PAIR == 1 ? keys.k[j] : j < (s.n + 1) / 2 ? k_pairs + j * d : nullptr;
      keys.dk[j] = sums.key + s.key[j] * sums.key_row;
      keys.dv[j] = sums.value + s.key[j] * sums.value_row;
    }
    for (int i = 0; i < blocks; ++i) {
      if (s.lo[i] >= s.hi[i]) continue;
      auto step_of = turned[i].width == 64   ? backward_step<P, T, 64>
                     : turned[i].width == 32 ? backward_step<P, T, 32>
                                             : backward_step<P, T, 16>;
      step_of(c, it, block[i], turned[i], s, i, keys, sums, ahead_k, ahead_v);
      ahead_k.row = ahead_v.row = nullptr;
    }
    now = then;
  }
  for (int i = 0; i < blocks; ++i) finish_queries<T>(c, it, block[i], turned[i], sums);
}

template <class T>
void collect_rows(const float* from, int64_t parts, int64_t stride, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += VL) {
    int m = n - i < VL ? (int)(n - i) : VL;
    vf x = vf{};
    for (int64_t p = 0; p < parts; ++p)
      x += m == VL ? load(from + p * stride + i) : widen_part(from + p * stride + i, m);
    if (m == VL) narrow(to + i, x);
    else narrow_part(to + i, x, m);
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
