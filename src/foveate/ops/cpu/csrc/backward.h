// Backward: scores and weights are computed again from the lse, then
//   dV = P^T dO,  dS = P (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q,
//   delta = rowsum(dO O) - dlse.
// An item adds to fp32 sums of its keys, which no other thread touches meanwhile.
#pragma once
#include <math.h>

#include "tiled_backward.h"

namespace foveate {
namespace FOVEATE_ISA {

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
    }
#endif
    if constexpr (!by_tiles) {
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
