// What one worker does at a time, and the buffers it uses.
#pragma once
#include <stdint.h>
#if defined(FOVEATE_WATCH_SCRATCH)
#include <stdlib.h>
#include <string.h>
#endif

#include "call.h"

namespace foveate {

constexpr int ROWS = 64;    // rows of a block: one bit each in a 64-bit word
constexpr int KEYS = 64;    // keys of one softmax step
constexpr int BLOCKS = 8;   // blocks of an item at most, which share each step's keys; without tiles
constexpr int FEWER_BLOCKS = 4;
constexpr int PACKED = 32;  // tiles of at most so many rows put several heads into a block

// Rows row0 .. row1 of a query tile for `heads` query heads from head0 on (one key/value head, one
// list), against entries entry0 .. entry1 of the tile's list.
struct Item {
  int32_t batch, head0, heads, tile, row0, row1, part, slot;
  int64_t entry0, entry1;
};

// Unnormalised output of an item that others share its rows with: [row][value_dim] sums with
// their maximum (base 2) and total.
struct Partial {
  float *out, *max, *total;
};

// Where an item of the backward adds its gradients. Keys: rows of fp32, `key_row` and `value_row`
// floats apart. Queries: (B, Hq, Lq, D) fp32 sums, or null where each query has one place only and
// goes straight to its tensor. Bias: head h's elements at bias + h * bias_h + q * bias_q + k * bias_k.
struct Sums {
  float *key, *value;
  int64_t key_row, value_row;
  float* query;
  float* bias;
  int64_t bias_h, bias_q, bias_k;
};

// Which virtual rows belong to each query, where they aren't the queries themselves.
struct Merge {
  int64_t parts;
  const int32_t *first, *rows;  // per group of q_index: (q_len + 1) offsets, then row numbers
  int64_t heads;                // groups along heads (1 or groups_h), and along batch
  int64_t batches;
};

// Memory that grows and is kept for the next call; aligned to 64 bytes.
struct Arena {
  char* data = nullptr;
  int64_t size = 0, used = 0;
};
bool reserve(Arena* arena, int64_t bytes);

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline char* take_bytes(Arena* arena, int64_t bytes) {
  char* p = arena->data + arena->used;
  arena->used += padded(bytes, 64);
#if defined(FOVEATE_WATCH_SCRATCH)  // for tests: nothing beyond its end, NaN in what nobody has written
  if (arena->used > arena->size) abort();
  memset(p, 0xff, bytes);
#endif
  return p;
}

// Where the last axis of a bias has the pair of a query and a key.
inline int64_t bias_at(const Call& c, int64_t query, int64_t key) {
  if (!c.bias_count) return key;
  int64_t at = key - (query + c.kv_len - c.q_len) - c.bias_first;
  return at < 0 ? 0 : at >= c.bias_count ? c.bias_count - 1 : at;
}

inline int64_t group_of(const Call& c, int64_t batch, int64_t head) {
  int64_t b = c.groups_b > 1 ? batch : 0, h = head / (c.heads / c.groups_h);
  return b * c.groups_h + h;
}
inline const int32_t* lookup(const Call& c, const Table& t, int64_t batch, int64_t head) {
  return t.data + batch * t.b + head / (c.heads / c.groups_h) * t.h;
}

}  // namespace foveate
