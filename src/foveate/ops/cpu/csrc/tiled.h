// Forward of an item's blocks by tiles: each step's values are turned once for all of them, then each panel
// of rows has its scores, its softmax and its sums one after the other.
#pragma once
#include "bias.h"
#include "rows.h"
#include "tiles.h"

namespace foveate {
namespace FOVEATE_ISA {

// A block's queries and sums lie in panels of so many rows: what a panel's step works on stays in the
// first-level cache.
constexpr int PANEL = 32;

#if defined(__AMX_BF16__)
// Keys lo .. lo + n of a step, whole tiles, that hold all that a block sees; `real` of them are there.
struct TileKeys {
  int lo = 0, n = 0, real = 0;
  bool all;             // every row sees every key; else
  uint64_t seen[KEYS];  // who sees each
  void take(const Step& s, int at) {
    int hi = (int)padded(s.hi[at], TILE_KEYS);
    lo = s.lo[at] & -TILE_KEYS;
    n = hi - lo;
    real = (hi < s.n ? hi : s.n) - lo;
    all = s.whole[at] && lo == s.lo[at] && hi == s.hi[at];
    for (int j = 0; !all && j < n; ++j) {
      bool inside = lo + j >= s.lo[at] && lo + j < s.hi[at];
      seen[j] = !inside ? 0 : s.whole[at] ? ~0ull : s.seen[at][lo + j];
    }
  }
  // The first `count` keys there are, which every row sees.
  void first(int count) {
    lo = 0;
    n = (int)padded(count, TILE_KEYS);
    real = count;
    all = n == count;
    for (int j = 0; !all && j < n; ++j) seen[j] = j < count ? ~0ull : 0;
  }
  const uint64_t* words() const { return all ? nullptr : seen; }
};

// Bias of a block as `bias_block` reads it, with zeros for keys that fill up a tile.
template <int W>
INLINE void bias_tiles(const Call& c, const Item& it, const Block& b, const int32_t* query, const int32_t* key,
                       const TileKeys& keys, float* biases) {
  bias_block(c, it, b, query, key + keys.lo, keys.real, W, 1, biases);
  memset(biases + keys.real * W, 0, sizeof(float) * (keys.n - keys.real) * W);
}

// Scores made ready where something is done with or added to them.
template <int W>
INLINE void adjust_block(const Call& c, const Item& it, const Block& b, const int32_t* query, const int32_t* key,
                         const TileKeys& keys, float* score, float* biases) {
  alignas(64) float top[W];
  for (int r = 0; r < W; ++r) top[r] = -__builtin_inff();
  if (c.bias) bias_tiles<W>(c, it, b, query, key, keys, biases);
  float inner = (float)(c.softcap != 0 ? c.scale / c.softcap : c.scale * LOG2E);
  adjust<W>(score, keys.n, inner, (float)c.softcap, c.bias ? biases : nullptr, keys.words(), top);
}

// An item's steps with the rows they point to, the next one always at hand to be fetched.
struct Steps {
  const Call& c;
  int64_t batch, kv_head;
  Stream* stream;
  Step step[2];
  const bf16 *k[2][KEYS], *v[2][KEYS];
  int now = 1;
  bool more;
  Steps(const Call& call, const Item& it, Stream* from, int64_t head)
      : c(call), batch(it.batch), kv_head(head), stream(from) {
    more = pull(0);
  }
  bool pull(int i) {
    if (!stream->next(&step[i])) return false;
    point(c.key, batch, kv_head, step[i], k[i]);
    point(c.value, batch, kv_head, step[i], v[i]);
    for (int j = step[i].n; j < KEYS; ++j) k[i][j] = k[i][0], v[i][j] = v[i][0];
    return true;
  }
  // On to the next step; false at the end.
  bool next() {
    if (!more) return false;
    now = 1 - now;
    more = pull(1 - now);
    return true;
  }
  const Step& at() const { return step[now]; }
  const bf16* const* ahead_k() const { return more ? k[1 - now] : nullptr; }
  const bf16* const* ahead_v() const { return more ? v[1 - now] : nullptr; }
};

INLINE int64_t forward_tiles_floats(const Call& c) {
  return KEYS * (padded(c.dim, 32) + padded(c.value_dim, 32)) / 2 + 2 * KEYS * ROWS + 64 * 16;
}

// `run` holds queries by pairs, rows in lanes, in panels, with zeros up to whole tiles.
INLINE void forward_tiles(const Call& c, const Item& it, const Block* block, Running* run, int blocks, Stream* stream,
                          int64_t kv_head, float scale, Arena* arena, const Item* following) {
  int64_t d = padded(c.dim, 32), dv = padded(c.value_dim, 32), sums = padded(c.value_dim, 16);
  auto floats = [&](int64_t n) { return (float*)take_bytes(arena, n * 4); };
  Matrix copied = {floats(KEYS * d / 2), d / 2}, k = copied, v = {floats(KEYS / 2 * dv), KEYS / 2};
  float* score = floats(KEYS * ROWS);
  float* biases = c.bias ? floats(KEYS * ROWS) : nullptr;
  bool adjusted = c.softcap != 0 || c.bias;
  TileUnit unit(true);
  TileKeys keys;
  Steps steps(c, it, stream, kv_head);
  while (steps.next()) {
    const Step& s = steps.at();
    if (!steps.more && following) fetch_queries<bf16>(c, *following);
    const bf16* const* k_row = steps.k[steps.now];
    // Whole tiles of keys are read where they lie, unless far apart, where one line would drive out the other.
    int64_t bytes = c.key.l * 2;
    bool dense = s.n % TILE_KEYS == 0 && c.dim % 32 == 0 && consecutive(s.key, s.n);
    if (dense && bytes > 0 && bytes % 64 == 0 && bytes <= 512) {
      k = {(float*)k_row[0], bytes / 4};
      if (steps.more) fetch(steps.ahead_k(), steps.step[1 - steps.now].n, c.dim);
    } else {
      k = copied;
      copy_pairs(k_row, s.n, (int)c.dim, k.stride, k.at, steps.ahead_k());
    }
    turn_pairs(steps.v[steps.now], s.n, (int)c.value_dim, v.stride, v.at, steps.ahead_v());
    for (int i = 0; i < blocks; ++i) {
      if (s.lo[i] >= s.hi[i]) continue;
      keys.take(s, i);
      Running& r = run[i];
      int panel = r.panel;
      Matrix ks = {k.at + keys.lo * k.stride, k.stride}, vs = {v.at + keys.lo / 2, v.stride};
      int64_t stride = adjusted ? r.width : panel;
      auto scores = [&](int at, float* to) {
        tiles(ks, {r.q + at * d, panel}, keys.n, panel, (int)d / 32, {to, stride}, false);
      };
      if (adjusted) {
        for (int at = 0; at < r.width; at += panel) scores(at, score + at);
        auto adjust_of = r.width == 64 ? adjust_block<64> : r.width == 32 ? adjust_block<32> : adjust_block<16>;
        adjust_of(c, it, block[i], r.query, s.key, keys, score, biases);
      }
      for (int at = 0; at < r.width; at += panel) {
        alignas(64) float alpha[PANEL];
        float *p = adjusted ? score + at : score, *o = r.o + at * dv;
        if (!adjusted) scores(at, p);
        bool moved = soften_tiles(p, stride, panel, keys.n, adjusted ? nullptr : keys.words(), at, scale, r.max + at,
                                  r.total + at, alpha, (const char*)o, panel * (int)sums / 16);
        if (moved && !r.first) rescale(o, (int)sums, panel, alpha);
        tiles(vs, {p, stride}, (int)sums, panel, keys.n / TILE_KEYS, {o, panel}, !r.first);
      }
      r.first = false;
    }
  }
}
#endif

}  // namespace FOVEATE_ISA
}  // namespace foveate
