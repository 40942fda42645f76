// How a call is cut into items, for the dispatcher; compiled once, for any machine.
#pragma once
#include <stdlib.h>

#include <new>
#include <vector>

#include "kernels.h"

namespace foveate {

const Kernels* chosen_kernels();

// Memory for one call, not cleared.
struct Buffer {
  float* data = nullptr;
  explicit Buffer(int64_t floats) {
    if (floats > 0 && !(data = (float*)malloc((size_t)floats * sizeof(float)))) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data); }
};

// Heaviest first in steps of half an octave; in between the given order, which keeps a head's keys
// in the cache, stays.
void heavy_first(std::vector<Item>* items);

// Virtual query rows: those of q_index, or the queries themselves.
int64_t query_rows(const Call& c);

// Without a layout: every query tile lists every key tile.
void make_dense(Call* c, int64_t blocks);

// About how many multiplications the two products over the visited tiles take, or as long as reading
// the keys and values for few rows takes.
double work(const Call& c);

// Bytes of the second-level cache as the system tells it, at most 1 MiB; 1 MiB if it doesn't tell.
int64_t near_cache();

// Blocks of rows for an item, so that there are enough items and their buffers have room. By tiles they may be
// more, since keys are brought into form for all of them.
int64_t blocks_for(const Call& c, bool tiles, int64_t threads, int64_t block_bytes, int64_t room);

// Items of heads from .. to of a batch entry, whole lists; last tiles first.
void add_items(const Call& c, int64_t batch, int64_t from, int64_t to, int64_t blocks,
               std::vector<Item>* items);

struct Inverse {
  std::vector<int32_t> first, rows;
  int64_t batches = 1, heads = 1;
  bool repeated = false, missing = false;
};

// For each group of q_index, the virtual rows of every query.
Inverse invert(const Call& c);

int backward(const Call& call);

}  // namespace foveate
