// Where a call's rows lie, and the running state of a block of them.
#pragma once
#include "call.h"
#include "pack.h"
#include "simd.h"

namespace foveate {
namespace FOVEATE_ISA {

template <class T> INLINE const T* row_at(const Rows& x, int64_t b, int64_t h, int64_t l) {
  return (const T*)x.data + b * x.b + h * x.h + l * x.l;
}

// A block with its running state, all in scratch: [element or value][panel lanes], panel after panel.
struct Running {
  float *q, *o, *max, *total;
  int32_t* query;
  int width;
  int panel;    // all of them, but in tiled.h
  int fold;     // keys in a vector of scores where o is kept by rows, and
  int across;   // vectors of queries that meet a key together; see folded.h
  bool by_row;  // o is [row][padded value]; see by_row.h
  bool first;
};

constexpr int64_t MAX_DIM_PAD = 16;

// Floats of a row where o is kept by rows.
INLINE int64_t row_floats(const Call& c) { return padded(c.value_dim, 2 * MAX_DIM_PAD); }

}  // namespace FOVEATE_ISA
}  // namespace foveate
