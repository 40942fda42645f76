// Softmax over parts: out = sum of exp2(max_i - max) sums_i / total.
#pragma once
#include <math.h>

#include "plan.h"
#include "simd.h"

namespace foveate {
namespace FOVEATE_ISA {

// One query row, numbered (batch * heads + head) * q_len + query.
template <class T>
void merge_row(const Call& c, const Partial& part, const Merge& m, int64_t row) {
  int64_t query = row % c.q_len, bh = row / c.q_len, head = bh % c.heads, batch = bh / c.heads;
  int64_t virtuals = c.q_index.data ? c.q_index.n : c.q_len;
  int64_t lo = query, hi = query + 1;
  const int32_t* rows = nullptr;
  if (m.first) {
    int64_t h = m.heads > 1 ? head / (c.heads / c.groups_h) : 0, b = m.batches > 1 ? batch : 0;
    int64_t group = b * m.heads + h;
    lo = m.first[group * (c.q_len + 1) + query];
    hi = m.first[group * (c.q_len + 1) + query + 1];
    rows = m.rows + group * virtuals;
  }
  float top = -1e30f, total = 0;
  auto slot = [&](int64_t p, int64_t i) {
    return ((p * c.batch + batch) * c.heads + head) * virtuals + (rows ? rows[i] : i);
  };
  for (int64_t p = 0; p < m.parts; ++p)
    for (int64_t i = lo; i < hi; ++i) {
      int64_t s = slot(p, i);
      if (part.total[s] != 0 && !(part.max[s] <= top)) top = part.max[s];
    }
  T* out = (T*)c.out.data + batch * c.out.b + head * c.out.h + query * c.out.l;
  for (int64_t p = 0; p < m.parts; ++p)
    for (int64_t i = lo; i < hi; ++i) {
      int64_t s = slot(p, i);
      if (part.total[s] != 0) total += part.total[s] * exp2f(part.max[s] - top);
    }
  float inverse = total != 0 ? 1 / total : 0;
  c.lse[row] = total != 0 ? top * LN2 + logf(total) : -__builtin_inff();
  for (int64_t d = 0; d < c.value_dim; d += VL) {
    int n = c.value_dim - d < VL ? (int)(c.value_dim - d) : VL;
    vf sum = vf{};
    for (int64_t p = 0; p < m.parts; ++p)
      for (int64_t i = lo; i < hi; ++i) {
        int64_t s = slot(p, i);
        if (part.total[s] == 0) continue;
        const float* from = part.out + s * c.value_dim + d;
        vf x = n == VL ? load(from) : widen_part(from, n);
        sum += x * set1(exp2f(part.max[s] - top) * inverse);
      }
    if (n == VL) narrow(out + d, sum);
    else narrow_part(out + d, sum, n);
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
