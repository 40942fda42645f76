// Compiled once for each instruction set; FOVEATE_ISA names it.
#include "forward.h"
#include "kernels.h"
#include "merge.h"

namespace foveate {
namespace FOVEATE_ISA {

static int64_t forward_bytes(const Call& c) { return forward_floats(c) * 4 + 64 * 64; }

static void forward(const Call& c, const Item& it, Arena* arena, const Partial* part) {
  if (c.dtype == F32) return forward_item<Single, float>(c, it, arena, part);
  if (c.dtype == F16) return forward_item<Single, f16>(c, it, arena, part);
#if defined(__AVX512BF16__)
  forward_item<Pair, bf16>(c, it, arena, part);
#else
  forward_item<Single, bf16>(c, it, arena, part);
#endif
}

static void merge(const Call& c, const Partial& part, const Merge& m, int64_t row) {
  if (c.dtype == F32) merge_row<float>(c, part, m, row);
  else if (c.dtype == F16) merge_row<f16>(c, part, m, row);
  else merge_row<bf16>(c, part, m, row);
}

#define QUOTE_(x) #x
#define QUOTE(x) QUOTE_(x)
static const Kernels table = {QUOTE(FOVEATE_ISA), forward_bytes, forward, merge};

}  // namespace FOVEATE_ISA

#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
const Kernels* GLUE(FOVEATE_ISA, _kernels)() { return &FOVEATE_ISA::table; }

}  // namespace foveate
