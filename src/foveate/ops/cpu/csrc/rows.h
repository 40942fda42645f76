// The rows that a step's keys are, and asking for rows before they are needed.
#pragma once
#include "running.h"
#include "stream.h"

namespace foveate {
namespace FOVEATE_ISA {

template <class T> INLINE void point(const Rows& x, int64_t b, int64_t h, const Step& s, const T** row) {
  const T* base = (const T*)x.data + b * x.b + h * x.h;
  for (int j = 0; j < s.n; ++j) row[j] = base + s.key[j] * x.l;
}

// Fetch rows that nothing has fetched ahead.
template <class T> INLINE void fetch(const T* const* row, int n, int64_t dim) {
  for (int j = 0; j < n; ++j)
    for (int64_t e = 0; e < dim; e += 64 / (int64_t)sizeof(T)) prefetch((const char*)(row[j] + e));
}

// Fetch the queries of an item that this thread takes next.
template <class T> INLINE void fetch_queries(const Call& c, const Item& it) {
  Block block[BLOCKS];
  int32_t query[ROWS];
  int blocks = make_blocks(c, it, block);
  for (int i = 0; i < blocks; ++i) {
    block_rows(c, it, &block[i], query);
    for (int r = 0; r < block[i].heads * block[i].rows; ++r) {
      if (query[r] < 0) continue;
      const T* row = row_at<T>(c.query, it.batch, block[i].head0 + r / block[i].rows, query[r]);
      fetch(&row, 1, c.dim);
    }
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
