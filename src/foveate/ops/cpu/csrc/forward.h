// Forward: for each item, one pass over its keys with an online softmax.
#pragma once
#include <math.h>

#include "bias.h"
#include "lined.h"
#include "tiled_alone.h"

namespace foveate {
namespace FOVEATE_ISA {

// Scratch floats that an item needs at most.
INLINE int64_t forward_floats(const Call& c) {
  int64_t d = padded(c.dim, 2 * MAX_DIM_PAD), v = padded(c.value_dim, 2 * MAX_DIM_PAD);
  int64_t block = ROWS * (d + v + 2) + ROWS + 16 * v;
  int64_t rest = KEYS * (d + v) + 3 * KEYS * ROWS + 4 * ROWS + 64 * 16;
#if defined(__AMX_BF16__)
  int64_t tiled = forward_tiles_floats(c), alone = lone_tiles_floats(c);
  if (c.dtype == BF16) return BLOCKS * block + (tiled > rest ? tiled : rest) + alone;
#endif
  return FEWER_BLOCKS * block + rest;
}

template <class P, class T, int W>
void forward_step(const Call& c, const Item& it, const Block& b, Running& run, const Step& s, int at,
                  const float* const* k, const float* const* v, float scale, float* score, float* weight,
                  float* biases, Ahead ahead_k, Ahead ahead_v) {
  alignas(64) float top[W], alpha[W];
  int lo = s.lo[at], hi = s.hi[at];
  if (P::PAIR == 2) lo &= ~1;
  int n = hi - lo;
  for (int r = 0; r < W; ++r) top[r] = -__builtin_inff();
  bool adjusted = c.softcap != 0 || c.bias;
  const uint64_t* seen = s.whole[at] && lo == s.lo[at] ? nullptr : s.seen[at] + lo;
  if (ahead_k.row) ahead_k.row += lo;
  if (ahead_v.row) ahead_v.row += lo;
  scores<P, W>(run.q, k + lo, n, elements<P>((int)c.dim), score, top, adjusted ? nullptr : seen, ahead_k);
  if (adjusted) {
    if (c.bias) bias_block(c, it, b, run.query, s.key + lo, n, W, 1, biases);
    float inner = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
    for (int r = 0; r < W; ++r) top[r] = -__builtin_inff();
    adjust<W>(score, n, inner, (float)c.softcap, c.bias ? biases : nullptr, seen, top);
  }
  const float* p = score;
#if defined(__AVX512BF16__)
  if (P::PAIR == 2) {
    soften_pairs<W>(score, n, top, scale, run.max, run.total, alpha, weight);
    p = weight;
  }
#endif
  if (P::PAIR == 1) soften<W, sizeof(T) == 2 ? 4 : 5>(score, n, top, scale, run.max, run.total, alpha);
  values<P, W>(p, v + lo / P::PAIR, (n + P::PAIR - 1) / P::PAIR, (int)c.value_dim, run.o, alpha, run.first,
               ahead_v);
  run.first = false;
}

// A block by rows as `finish` takes it.
INLINE void turn_block(const Call& c, Running& run, int rows, float* scratch) {
  int f = run.fold;
  if (!run.first) {
    turn_rows(run.o, row_floats(c), run.width, rows, (int)c.value_dim, scratch);
    memcpy(run.o, scratch, sizeof(float) * run.width * c.value_dim);
  }
  for (int r = 0; r < rows; ++r) {
    float total = 0;
    for (int i = 0; i < f; ++i) total += run.total[r * f + i];
    run.max[r] = run.max[r * f];
    run.total[r] = total;
  }
}

// Write a finished block: straight to the output, or its sums to `part`.
template <class T>
INLINE void finish(const Call& c, const Item& it, const Block& b, Running& run, const Partial* part) {
  alignas(64) float inverse[ROWS];
  T* out[ROWS];
  float* sums[ROWS];
  int used = b.heads * b.rows;
  int64_t dv = padded(c.value_dim, 2 * MAX_DIM_PAD);
  if (run.first) memset(run.o, 0, sizeof(float) * run.width * dv);
  for (int r = 0; r < run.width; ++r) {
    out[r] = nullptr;
    sums[r] = nullptr;
    inverse[r] = 0;
    if (r >= used) continue;
    int64_t head = b.head0 + r / b.rows, q = run.query[r];
    if (part) {
      int64_t virtuals = c.q_index.data ? c.q_index.n : c.q_len;
      int64_t v = (int64_t)it.tile * c.q_tile + b.row0 + r % b.rows;
      if (v >= virtuals) continue;
      int64_t slot = ((it.part * c.batch + it.batch) * c.heads + head) * virtuals + v;
      sums[r] = part->out + slot * c.value_dim;
      part->max[slot] = run.max[r];
      part->total[slot] = q < 0 ? 0 : run.total[r];
      inverse[r] = q < 0 ? 0 : 1;
    } else if (q >= 0) {
      float total = run.total[r];
      inverse[r] = total != 0 ? 1 / total : 0;
      out[r] = (T*)c.out.data + it.batch * c.out.b + head * c.out.h + q * c.out.l;
      c.lse[(it.batch * c.heads + head) * c.q_len + q] =
          total != 0 ? run.max[r] * LN2 + logf(total) : -__builtin_inff();
    }
  }
  for (int r = 0; r < run.width; r += run.panel) {
    if (part) lanes_to_rows(run.o + r * dv, run.panel, (int)c.value_dim, inverse + r, sums + r);
    else lanes_to_rows(run.o + r * dv, run.panel, (int)c.value_dim, inverse + r, out + r);
  }
}

template <class P, class T>
void forward_item(const Call& c, const Item& it, const Item* following, Arena* arena,
                  const Partial* part) {
  int64_t d = padded(c.dim, 2 * MAX_DIM_PAD), dv = padded(c.value_dim, 2 * MAX_DIM_PAD);
  arena->used = 0;
  auto floats = [&](int64_t n) { return (float*)take_bytes(arena, n * 4); };
  Block block[BLOCKS];
  Running run[BLOCKS];
  int blocks = make_blocks(c, it, block);
  int64_t kv_head = it.head0 / (c.heads / c.kv_heads);
  float sign = c.scale < 0 ? -1.0f : 1.0f, scale = (float)fabs(c.scale) * LOG2E;
  bool adjusted = c.softcap != 0 || c.bias;
  if (adjusted) sign = 1, scale = 1;
  if (c.scale == 0 && !adjusted) sign = 0, scale = 1;
  for (int i = 0; i < blocks; ++i) {
    run[i].query = (int32_t*)floats(ROWS);
    block_rows(c, it, &block[i], run[i].query);
  }
  Stream stream;
  stream.start(c, it, block, blocks);
  // Keys are read where they lie if a product can take them so.
  bool copy_k = sizeof(T) == 2 && (P::PAIR == 1 || c.dim % 2), copy_v = sizeof(T) == 2;
  bool by_tiles = false;
  for (int i = 0; i < blocks; ++i) by_tiles |= TILES && P::PAIR == 2 && block[i].heads * block[i].rows > FEWER;
  bool whole = sizeof(T) == 2 || c.value_dim % VL == 0;
  bool few = blocks == 1 && block[0].heads * block[0].rows <= VL && !by_tiles && whole;
  bool lined = few && VL == 16 && !adjusted && !copy_k && c.key.l > 0 && c.value.l > 0;
  stream.skips = lined;
  Step step[2];
  const T *k_row[2][KEYS], *v_row[2][KEYS];
  int now = 0;
  bool more = !by_tiles && stream.next(&step[0]);
  if (more) {
    point(c.key, it.batch, kv_head, step[0], k_row[0]);
    point(c.value, it.batch, kv_head, step[0], v_row[0]);
    fetch(k_row[0], step[0].n, c.dim);
  }
  for (int i = 0; i < blocks; ++i) {
    Block& b = block[i];
    Running& r = run[i];
    int used = b.heads * b.rows;
    r.width = used <= 16 ? 16 : used <= 32 ? 32 : 64;
    r.by_row = used <= VL && !by_tiles && whole;
    r.fold = r.by_row ? fold_for<P>(c, used) : 1;
    if (r.fold == 1 && r.width != VL) r.by_row = false;
    r.across = across_for<P>(c, r.fold);
    r.q = floats(r.width * d);
    r.o = floats(r.width * dv);
    r.max = floats(r.width);
    r.total = floats(r.width);
    r.first = true;
    const T* row[ROWS];
    for (int j = 0; j < r.width; ++j) {
      r.max[j] = LOWEST;
      r.total[j] = 0;
      row[j] = nullptr;
      if (j >= used || r.query[j] < 0) continue;
      int64_t head = b.head0 + j / b.rows;
      row[j] = row_at<T>(c.query, it.batch, head, r.query[j]);
      if (part) continue;
      const T* out = row_at<T>(c.out, it.batch, head, r.query[j]);
      for (int64_t e = 0; e < c.value_dim; e += 64 / (int64_t)sizeof(T)) __builtin_prefetch(out + e, 1, 2);
    }
    r.panel = by_tiles && r.width > PANEL ? PANEL : r.width;
    if (by_tiles) memset(r.q, 0, sizeof(float) * r.width * d);
    if (r.by_row) fold<P>(row, (int)c.dim, r.fold, r.across, r.q);
    else
      for (int at = 0; at < r.width; at += r.panel) rows_to_lanes<P>(row + at, r.panel, (int)c.dim, r.q + at * d);
    if (sign != 1) {
      int64_t n = by_tiles ? r.width * d : (int64_t)(r.by_row ? VL / r.fold : r.width) * elements<P>((int)c.dim);
      if (sign == 0) memset(r.q, 0, n * 4);
      else if (P::PAIR == 2)
        for (int64_t j = 0; j < n; ++j) ((uint32_t*)r.q)[j] ^= 0x80008000u;
      else
        for (int64_t j = 0; j < n; ++j) r.q[j] = -r.q[j];
    }
  }
  if (P::PAIR == 2) {
    copy_v = false;
    for (int i = 0; i < blocks; ++i) copy_v |= !run[i].by_row;
  }
#if defined(__AMX_BF16__)
  if constexpr (P::PAIR == 2) {
    if (by_tiles) {
      if (blocks == 1 && run[0].width <= ALONE) lone_tiles(c, it, block[0], run[0], &stream, kv_head, scale, arena);
      else forward_tiles(c, it, block, run, blocks, &stream, kv_head, scale, arena, following);
      for (int i = 0; i < blocks; ++i) finish<T>(c, it, block[i], run[i], part);
      return;
    }
  }
#endif
  float* keys = copy_k ? floats(KEYS * d) : nullptr;
  float* vals = copy_v ? floats(KEYS * dv) : nullptr;
  float* score = floats(KEYS * ROWS);
  float* weight = P::PAIR == 2 ? floats(KEYS / 2 * ROWS) : nullptr;
  float* biases = c.bias ? floats(KEYS * ROWS) : nullptr;
  const float *k[KEYS], *v[KEYS];
  const float* const* rows = v;
  if (lined) lined_keys_for<P, T>(run[0])(c, it, run[0], stream, kv_head, scale, score, weight);
  if (more) fetch(v_row[0], step[0].n, c.value_dim);
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
      ahead_k = {(const char* const*)k_row[then], (int)(c.dim * sizeof(T))};
      ahead_v = {(const char* const*)v_row[then], (int)(c.value_dim * sizeof(T))};
    }
    if (!more && following) fetch_queries<T>(c, *following);
    if (copy_k) {
      copy_rows<P>(k_row[now], s.n, (int)c.dim, d, keys);
      for (int j = 0; j < s.n; ++j) k[j] = keys + j * d;
    } else {
      for (int j = 0; j < s.n; ++j) k[j] = (const float*)k_row[now][j];
    }
    if (!copy_v) {
      for (int j = 0; j < s.n; ++j) v[j] = (const float*)v_row[now][j];
    } else if (P::PAIR == 1) {
      copy_rows<P>(v_row[now], s.n, (int)c.value_dim, dv, vals);
      for (int j = 0; j < s.n; ++j) v[j] = vals + j * dv;
    } else {
#if defined(__AVX512BF16__)
      interleave_rows((const bf16* const*)v_row[now], s.n, (int)c.value_dim, dv, vals);
      for (int j = 0; j < (s.n + 1) / 2; ++j) v[j] = vals + j * dv;
#endif
    }
    if (P::PAIR == 2) rows = (const float* const*)v_row[now];
    for (int i = 0; i < blocks; ++i) {
      if (s.lo[i] >= s.hi[i]) continue;
      if (run[i].by_row) {
        few_step_for<P, T>(run[i])(c, it, block[i], run[i], s, i, k, rows, scale, score, weight, biases,
                                   ahead_k, ahead_v);
        ahead_k.row = ahead_v.row = nullptr;
        continue;
      }
      auto step_of = run[i].width == 64   ? forward_step<P, T, 64>
                     : run[i].width == 32 ? forward_step<P, T, 32>
                                          : forward_step<P, T, 16>;
      step_of(c, it, block[i], run[i], s, i, k, v, scale, score, weight, biases, ahead_k, ahead_v);
      ahead_k.row = ahead_v.row = nullptr;
    }
    now = then;
  }
  for (int i = 0; i < blocks; ++i)
    if (run[i].by_row) turn_block(c, run[i], block[i].heads * block[i].rows, floats(16 * dv));
  for (int i = 0; i < blocks; ++i) finish<T>(c, it, block[i], run[i], part);
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
