// The C interface: one struct for a call, filled in by ctypes (binding.py mirrors it field by field).
#pragma once
#include <stdint.h>

namespace foveate {

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };
enum Kind { FULL = 0, KEY_RANGE = -1, ROW_RANGE = -2 };

// A tensor of (batch, head, row) whose last axis is contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t b, h, l;
};
// A list per (batch, head) group; a stride of 0 shares it.
struct Table {
  const int32_t* data;
  int64_t b, h, n;
};

struct Call {
  int64_t dtype, batch, heads, kv_heads, q_len, kv_len, dim, value_dim, threads;
  double scale, softcap;  // softcap 0: none
  Rows query, key, value, out;
  float* lse;  // (B, Hq, Lq)
  // bias (B, Hq, Lq, Lkv) by strides, 0 where broadcast
  const void* bias;
  int64_t bias_dtype, bias_b, bias_h, bias_q, bias_k;
  int64_t bias_first, bias_count;  // of a relative bias: distance of its first entry, and entries
  // layout; ptr null: every query sees every key
  int64_t q_tile, kv_tile, q_tiles, kv_tiles, groups_b, groups_h, entries, patterns, lists;
  const int64_t* ptr;
  const int32_t *cols, *kinds;
  const uint8_t* bits;
  const int32_t* gathered;
  Table q_index, kv_index, key_range, row_range;
  // backward
  Rows grad_out;  // contiguous last axis; data null: zero
  const float* grad_lse;  // (B, Hq, Lq) or null
  Rows grad_query, grad_key, grad_value;
  float* grad_bias;  // the bias's shape, contiguous fp32, zeroed by the caller, or null
  int64_t gbias_b, gbias_h, gbias_q, gbias_k;
};

}  // namespace foveate
