// Compiled once for each instruction set; FOVEATE_ISA names it.
#include "backward.h"
#include "forward.h"
#include "kernels.h"
#include "merge.h"

namespace foveate {
namespace FOVEATE_ISA {

static int64_t forward_bytes(const Call& c) { return forward_floats(c) * 4 + 64 * 64; }

static void forward(const Call& c, const Item& it, const Item* following, Arena* arena,
                    const Partial* part) {
  if (c.dtype == F32) return forward_item<Single, float>(c, it, following, arena, part);
  if (c.dtype == F16) return forward_item<Single, f16>(c, it, following, arena, part);
#if defined(__AVX512BF16__)
  forward_item<Pair, bf16>(c, it, following, arena, part);
#else
  forward_item<Single, bf16>(c, it, following, arena, part);
#endif
}

static int64_t backward_bytes(const Call& c, int64_t blocks) {
  return backward_floats(c, blocks) * 4 + 64 * 64;
}

static void backward(const Call& c, const Item& it, Arena* arena, const Sums& sums) {
  if (c.dtype == F32) return backward_item<Single, float>(c, it, arena, sums);
  if (c.dtype == F16) return backward_item<Single, f16>(c, it, arena, sums);
#if defined(__AVX512BF16__)
  backward_item<Pair, bf16>(c, it, arena, sums);
#else
  backward_item<Single, bf16>(c, it, arena, sums);
#endif
}

static void collect(const Call& c, const float* from, int64_t parts, int64_t stride, int64_t n,
                    void* to) {
  if (c.dtype == F32) collect_rows(from, parts, stride, n, (float*)to);
  else if (c.dtype == F16) collect_rows(from, parts, stride, n, (f16*)to);
  else collect_rows(from, parts, stride, n, (bf16*)to);
}

static void merge(const Call& c, const Partial& part, const Merge& m, int64_t row) {
  if (c.dtype == F32) merge_row<float>(c, part, m, row);
  else if (c.dtype == F16) merge_row<f16>(c, part, m, row);
  else merge_row<bf16>(c, part, m, row);
}

#define QUOTE_(x) #x
#define QUOTE(x) QUOTE_(x)
static const Kernels table = {QUOTE(FOVEATE_ISA), TILES, forward_bytes, forward,
                              backward_bytes, backward, collect, merge};

}  // namespace FOVEATE_ISA

#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
const Kernels* GLUE(FOVEATE_ISA, _kernels)() { return &FOVEATE_ISA::table; }

}  // namespace foveate
