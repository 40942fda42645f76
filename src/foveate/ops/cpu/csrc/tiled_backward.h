// A block's part in a step of the backward by tiles: the five products, with keys and values by pairs once for all
// blocks, and dK and dV summed over them before they go to their rows.
#pragma once
#include "turned.h"

namespace foveate {
namespace FOVEATE_ISA {

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
    if (c.bias) bias_tiles<W>(c, it, b, t.query, step.key, range, keys.bias);
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

// to += from, whole vectors; fetches as much from `far` (null: nothing).
INLINE void add_row(const float* from, int dim, float* to, const float* far) {
  for (int e = 0; e < dim; e += VL) {
    if (far) __builtin_prefetch(far + e, 1, 2);
    store(to + e, load(to + e) + load(from + e));
  }
}
#endif

}  // namespace FOVEATE_ISA
}  // namespace foveate
