// What is added to the scores: read from, and its gradient added to, any bias that broadcasts. Along
// consecutive keys a row's entries lie side by side as a rule, also those of a relative bias between
// its ends: such runs are turned into lanes where they lie, other rows are first gathered into one.
#pragma once
#include "kernels.h"
#include "pack.h"
#include "stream.h"

namespace foveate {
namespace FOVEATE_ISA {

// Whether `keys` keys follow one another.
INLINE bool consecutive(const int32_t* key, int keys) {
  for (int j = 1; j < keys; ++j)
    if (key[j] != key[0] + j) return false;
  return true;
}

// The entry of the first of `keys` consecutive keys if the others follow it, or -1.
INLINE int64_t first_of_run(const Call& c, int64_t query, int32_t key, int keys) {
  int64_t at = bias_at(c, query, key);
  return bias_at(c, query, key + keys - 1) == at + keys - 1 ? at : -1;
}

template <class T>
INLINE void read_bias(const T* data, const Call& c, const Item& it, const Block& b, const int32_t* query,
                      const int32_t* key, int keys, int width, int fold, float* out) {
  T gathered[ROWS * KEYS];
  const T* row[ROWS];
  bool runs = c.bias_k == 1 && consecutive(key, keys);
  for (int r = 0; r < width; ++r) {
    row[r] = nullptr;
    if (r >= b.heads * b.rows) continue;
    int64_t q = query[r] < 0 ? 0 : query[r];
    const T* from = data + it.batch * c.bias_b + (b.head0 + r / b.rows) * c.bias_h + q * c.bias_q;
    int64_t first = runs ? first_of_run(c, q, key[0], keys) : -1;
    if (first >= 0) {
      row[r] = from + first;
      continue;
    }
    T* to = gathered + r * KEYS;
    for (int j = 0; j < keys; ++j) to[j] = from[bias_at(c, q, key[j]) * c.bias_k];
    row[r] = to;
  }
  if (fold == 1) {
    rows_to_lanes<Single>(row, width, keys, out);
    return;
  }
  memset(out, 0, sizeof(float) * width * ((keys + fold - 1) / fold));
  for (int r = 0; r < b.heads * b.rows; ++r)
    for (int j = 0; j < keys; j += fold)
      for (int i = 0; i < fold && j + i < keys; ++i)
        out[j / fold * width + r * fold + i] = to_float(row[r][j + i]);
}

// Bias of a block, [key / fold][row * fold + key % fold]; `fold` is 1 but in folded.h.
INLINE void bias_block(const Call& c, const Item& it, const Block& b, const int32_t* query,
                       const int32_t* key, int keys, int width, int fold, float* out) {
  if (c.bias_dtype == F32)
    read_bias((const float*)c.bias, c, it, b, query, key, keys, width, fold, out);
  else if (c.bias_dtype == BF16)
    read_bias((const bf16*)c.bias, c, it, b, query, key, keys, width, fold, out);
  else
    read_bias((const f16*)c.bias, c, it, b, query, key, keys, width, fold, out);
}

// Add ds[key][row], before slope and scale, to the gradient of the bias.
INLINE void add_bias(const Call& c, const Block& b, const int32_t* query, const int32_t* key, int keys,
                     int width, const float* ds, const Sums& sums) {
  alignas(64) float turned[ROWS * KEYS];
  alignas(64) float ones[ROWS];
  float* row[ROWS];
  for (int r = 0; r < width; ++r) {
    ones[r] = 1;
    row[r] = r < b.heads * b.rows && query[r] >= 0 ? turned + r * KEYS : nullptr;
  }
  lanes_to_rows(ds, width, keys, ones, row);
  bool runs = sums.bias_k == 1 && consecutive(key, keys);
  for (int r = 0; r < b.heads * b.rows; ++r) {
    if (!row[r]) continue;
    float* to = sums.bias + (b.head0 + r / b.rows) * sums.bias_h + query[r] * sums.bias_q;
    int64_t first = runs ? first_of_run(c, query[r], key[0], keys) : -1;
    if (first >= 0)
      for (int j = 0; j < keys; ++j) to[first + j] += row[r][j];
    else
      for (int j = 0; j < keys; ++j) to[bias_at(c, query[r], key[j]) * sums.bias_k] += row[r][j];
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
