// Forward by tiles for one block alone of few rows, as in decoding. Keys are read where they lie, and values need
// no turning: their rows are joined by pairs, and a step's weights, which are few, are turned instead.
#pragma once
#include "lined.h"
#include "tiled.h"

namespace foveate {
namespace FOVEATE_ISA {

constexpr int ALONE = 32;  // rows of such a block at most

#if defined(__AMX_BF16__)
// s[key][16 N] of n keys, whole tiles, `bytes` apart; fetches what lies `far` bytes further (0: nothing).
template <int N>
INLINE void scores_in_place(const char* k, int64_t bytes, int n, Matrix q, int steps, Matrix s, int64_t far) {
  for (int j = 0; j < n; j += 32) {
    tile_zero<0>();
    tile_zero<2>();
    if (N == 2) tile_zero<1>(), tile_zero<3>();
    for (int t = 0; t < steps; ++t) {
      const char* at = k + j * bytes + t * 64;
      const float* row = q.at + t * 16 * q.stride;
      tile_load<6>(row, q.stride * 4);
      tile_load<4>(at, bytes);
      tile_product<0, 4, 6>();
      if (N == 2) {
        tile_load<7>(row + 16, q.stride * 4);
        tile_product<1, 4, 7>();
      }
      tile_load<5>(at + 16 * bytes, bytes);
      tile_product<2, 5, 6>();
      if (N == 2) tile_product<3, 5, 7>();
      for (int i = 0; far && i < 32; ++i) prefetch(at + far + i * bytes);
    }
    float *to = s.at + j * s.stride, *below = to + 16 * s.stride;
    tile_store<0>(to, s.stride * 4);
    tile_store<2>(below, s.stride * 4);
    if (N == 2) tile_store<1>(to + 16, s.stride * 4), tile_store<3>(below + 16, s.stride * 4);
  }
}

// to[pair of rows][dim, padded to 32]: of every 32 elements first the even ones, then the odd ones; zeros in what
// fills up a tile. Fetches the rows `next` (null: none).
INLINE void join_pairs(const bf16* const* row, int n, int dim, int64_t stride, float* to, const bf16* const* next) {
  const __mmask32 high = 0xaaaaaaaa;
  for (int j = 0; j < (int)padded(n, TILE_KEYS); j += 2)
    for (int d = 0; d < dim; d += 32) {
      int m = dim - d;
      __mmask32 some = m >= 32 ? ~0u : (1u << m) - 1;
      if (next && j + 1 < n) prefetch((const char*)(next[j] + d)), prefetch((const char*)(next[j + 1] + d));
      __m512i a = j < n ? _mm512_maskz_loadu_epi16(some, row[j] + d) : _mm512_setzero_si512();
      __m512i b = j + 1 < n ? _mm512_maskz_loadu_epi16(some, row[j + 1] + d) : _mm512_setzero_si512();
      float* at = to + j / 2 * stride + d;
      _mm512_storeu_si512(at, _mm512_mask_blend_epi16(high, a, _mm512_slli_epi32(b, 16)));
      _mm512_storeu_si512(at + 16, _mm512_mask_blend_epi16(high, _mm512_srli_epi32(a, 16), b));
    }
}

// to[row][pair of keys] from p[pair][width], of n keys.
INLINE void turn_weights(const float* p, int n, int width, float* to) {
  for (int r = 0; r < width; r += 16)
    for (int j = 0; j < n / 2; j += 16) {
      vf t[16];
      for (int i = 0; i < 16; ++i) t[i] = load(p + (j + i) * width + r);
      transpose(t);
      for (int i = 0; i < 16; ++i) store(to + (r + i) * (n / 2) + j, t[i]);
    }
}

// The state of the block: o[row] with elements in the order of `join_pairs` until it is done.
struct LoneTiles {
  const Call& c;
  const Item& it;
  const Block& block;
  Running& run;
  int64_t d, dv;
  float scale;
  float *k, *v, *score, *weight, *biases;
  TileKeys keys;

  // Keys of `keys`, the first at k (`bytes` apart) and v; `key` are their numbers.
  void meet(const char* k_at, int64_t bytes, int64_t far, const bf16* const* v_row, const bf16* const* v_next,
            const int32_t* key) {
    bool adjusted = c.softcap != 0 || c.bias;
    int width = run.width;
    alignas(64) float alpha[ALONE];
    auto scores = width == 32 ? scores_in_place<2> : scores_in_place<1>;
    scores(k_at, bytes, keys.n, {run.q, width}, (int)d / 32, {score, width}, far);
    if (adjusted) {
      auto adjust_of = width == 32 ? adjust_block<32> : adjust_block<16>;
      adjust_of(c, it, block, run.query, key, keys, score, biases);
    }
    bool moved = soften_tiles(score, width, width, keys.n, adjusted ? nullptr : keys.words(), 0, scale, run.max,
                              run.total, alpha, nullptr, 0);
    for (int r = 0; moved && !run.first && r < width; ++r)
      for (int e = 0; e < dv; e += VL) store(run.o + r * dv + e, load(run.o + r * dv + e) * alpha[r]);
    turn_weights(score, keys.n, width, weight);
    join_pairs(v_row, keys.real, (int)c.value_dim, dv, v, v_next);
    tiles({weight, keys.n / 2}, {v, dv}, width, (int)dv, keys.n / TILE_KEYS, {run.o, dv}, !run.first);
    run.first = false;
  }

  // Whole tiles that lie one behind the other, a few keys at a time.
  void meet_lines(const Stream& stream, int64_t kv_head) {
    const bf16* keys_at = row_at<bf16>(c.key, it.batch, kv_head, 0);
    const bf16* vals_at = row_at<bf16>(c.value, it.batch, kv_head, 0);
    // So that the first-level cache holds keys, values and what is made of them.
    int chunk = run.width > 16 || d > 64 || dv > 64 ? 32 : 64;
    const bf16 *k_row[KEYS], *k_next[KEYS], *v_row[KEYS], *v_next[KEYS];
    Lines now = {&stream, stream.it->entry0, 0, 0, 0};
    bool more = now.next(chunk);
    while (more) {
      Lines then = now;
      more = then.next(chunk);
      int64_t ahead = more ? then.first - now.first : 0;
      keys.first(now.n);
      for (int j = 0; j < now.n; ++j) {
        v_row[j] = vals_at + (now.first + j) * c.value.l;
        v_next[j] = v_row[j] + ahead * c.value.l;
      }
      const bf16* at = keys_at + now.first * c.key.l;
      int64_t bytes = c.key.l * 2, far = ahead * bytes;
      if (now.n % 32 || c.dim % 32) {
        for (int j = 0; j < now.n; ++j) k_row[j] = at + j * c.key.l;
        for (int j = 0; j < now.n; ++j) k_next[j] = k_row[j] + ahead * c.key.l;
        copy_pairs(k_row, now.n, (int)c.dim, d / 2, k, more ? k_next : nullptr);
        at = (const bf16*)k;
        bytes = d * 2;
        far = 0;
      }
      meet((const char*)at, bytes, far, v_row, more ? v_next : nullptr, nullptr);
      now = then;
    }
  }

  // Whatever else the stream holds.
  void meet_rest(Stream* stream, int64_t kv_head) {
    Steps steps(c, it, stream, kv_head);
    while (steps.next()) {
      const Step& s = steps.at();
      if (s.lo[0] >= s.hi[0]) continue;
      keys.take(s, 0);
      const bf16 *const *k_row = steps.k[steps.now] + keys.lo, *const *v_row = steps.v[steps.now] + keys.lo;
      copy_pairs(k_row, keys.real, (int)c.dim, d / 2, k, steps.ahead_k());
      meet((const char*)k, d * 2, 0, v_row, steps.ahead_v(), s.key);
    }
  }
};

INLINE int64_t lone_tiles_floats(const Call& c) {
  int64_t d = padded(c.dim, 32), dv = padded(c.value_dim, 32);
  return KEYS * (d + dv) / 2 + KEYS * ALONE * 2 + KEYS * ALONE / 2 + ALONE * dv + 64 * 16;
}

// `run` as for `forward_tiles`, but in one panel.
INLINE void lone_tiles(const Call& c, const Item& it, const Block& block, Running& run, Stream* stream,
                       int64_t kv_head, float scale, Arena* arena) {
  auto floats = [&](int64_t n) { return (float*)take_bytes(arena, n * 4); };
  int64_t d = padded(c.dim, 32), dv = padded(c.value_dim, 32), width = run.width;
  bool adjusted = c.softcap != 0 || c.bias;
  TileUnit unit(true);
  LoneTiles lone{c, it, block, run, d, dv, scale,
                 floats(KEYS * d / 2), floats(KEYS / 2 * dv), floats(KEYS * width), floats(KEYS / 2 * width),
                 c.bias ? floats(KEYS * width) : nullptr, {}};
  stream->skips = !adjusted && c.key.l > 0 && c.value.l > 0;
  if (stream->skips) lone.meet_lines(*stream, kv_head);
  lone.meet_rest(stream, kv_head);
  if (run.first) return;
  float* rows = floats(width * dv);
  memcpy(rows, run.o, sizeof(float) * width * dv);
  for (int r = 0; r < width; ++r)
    for (int e = 0; e < c.value_dim; ++e) {
      int at = e / 32 * 32 + e % 2 * 16 + e % 32 / 2;
      run.o[e * width + r] = rows[r * dv + at];
    }
}
#endif

}  // namespace FOVEATE_ISA
}  // namespace foveate
