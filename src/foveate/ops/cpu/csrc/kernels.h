// The kernels of one instruction set, as the dispatcher sees them.
#pragma once
#include "plan.h"

namespace foveate {

struct Kernels {
  const char* name;
  bool tiles;  // bf16 goes by tiles
  int64_t (*forward_bytes)(const Call&);
  // `following`: the item that this thread takes next, or null.
  void (*forward)(const Call&, const Item&, const Item* following, Arena*, const Partial*);
  int64_t (*backward_bytes)(const Call&, int64_t blocks);
  void (*backward)(const Call&, const Item&, Arena*, const Sums&);
  // to[i] = sum over parts of from[i + part * stride], rounded to the call's dtype.
  void (*collect)(const Call&, const float* from, int64_t parts, int64_t stride, int64_t n, void* to);
  // Bring partial sums of query rows from .. to of (batch, head) together.
  void (*merge)(const Call&, const Partial&, const Merge&, int64_t row);
};

const Kernels* portable_kernels();
#if defined(FOVEATE_AVX2)
const Kernels* avx2_kernels();
#endif
#if defined(FOVEATE_AVX512)
const Kernels* avx512_kernels();
#endif
#if defined(FOVEATE_AVX512BF16)
const Kernels* avx512bf16_kernels();
#endif
#if defined(FOVEATE_AMX)
const Kernels* amx_kernels();
#endif

}  // namespace foveate
