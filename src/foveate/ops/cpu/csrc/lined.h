// Few rows against keys that all of them see and that lie one behind the other, as in decoding.
#pragma once
#include "by_row.h"
#include "folded.h"
#include "running.h"
#include "softmax.h"
#include "stream.h"

namespace foveate {
namespace FOVEATE_ISA {

// Keys first .. first + n of whole tiles that lie one behind the other, a few at a time.
struct Lines {
  const Stream* stream;
  int64_t entry, at, first;
  int n;
  // The next ones; false at the end of the list.
  bool next(int chunk) {
    n = 0;
    for (; entry < stream->it->entry1; ++entry, at = 0) {
      int64_t whole = stream->whole_at(entry), left = whole - at;
      if (left <= 0) continue;
      int64_t col = stream->c->ptr ? stream->c->cols[entry] : entry, key = col * stream->slots + at;
      if (n && key != first + n) return true;
      if (!n) first = key;
      int more = (int)(left < chunk - n ? left : chunk - n);
      n += more;
      at += more;
      if (n == chunk) return true;
    }
    return n > 0;
  }
};

// A block of few rows against all of those, CHUNK keys at a time: then keys and values stay two streams
// that the processor itself reads ahead, with the next chunk's lines fetched one for one.
template <class P, class T, int F>
void lined_keys(const Call& c, const Item& it, Running& run, const Stream& stream, int64_t kv_head,
                float scale, float* score, float* weight) {
  constexpr int CHUNK = F == 1 || (F == 2 && P::PAIR == 2) ? 32 : 16;
  alignas(64) float top[VL], alpha[VL];
  const char* keys = (const char*)row_at<T>(c.key, it.batch, kv_head, 0);
  const char* vals = (const char*)row_at<T>(c.value, it.batch, kv_head, 0);
  int64_t ks = c.key.l * (int64_t)sizeof(T), vs = c.value.l * (int64_t)sizeof(T);
  Lines now = {&stream, stream.it->entry0, 0, 0, 0};
  bool more = now.next(CHUNK);
  while (more) {
    Lines then = now;
    more = then.next(CHUNK);
    int64_t ahead = more ? then.first - now.first : 0;
    int n = now.n;
    Lined k = {keys + now.first * ks, ks, ahead * ks}, v = {vals + now.first * vs, vs, ahead * vs};
    if (F > 1) {
      scores_folded<P, F>(run.q, k, n, elements<P>((int)c.dim) / F, score);
      settle<F>(score, n, false, 0, 0, nullptr, nullptr, top);
      soften<VL, sizeof(T) == 2 ? 4 : 5>(score, (n + F - 1) / F, top, scale, run.max, run.total, alpha);
      pair_weights<P>(score, (n + F - 1) / F);
      values_by_row<P, F>(score, v, n, (int)c.value_dim, run.o, row_floats(c), alpha, run.first);
    } else {
      const float* row[CHUNK];
      const char* far[CHUNK];
      for (int j = 0; j < n; ++j) {
        row[j] = k.row(j);
        far[j] = k.next(j);
      }
      store(top, set1(-__builtin_inff()));
      Ahead next = {far, (int)(c.dim * sizeof(T))};
      scores<P, VL>(run.q, row, n, elements<P>((int)c.dim), score, top, nullptr, next);
      const float* p = score;
#if defined(__AVX512BF16__)
      if (P::PAIR == 2) {
        soften_pairs<VL>(score, n, top, scale, run.max, run.total, alpha, weight);
        p = weight;
      }
#endif
      if (P::PAIR == 1) soften<VL, sizeof(T) == 2 ? 4 : 5>(score, n, top, scale, run.max, run.total, alpha);
      values_by_row<P, 1>(p, v, n, (int)c.value_dim, run.o, row_floats(c), alpha, run.first);
    }
    run.first = false;
    now = then;
  }
}

template <class P, class T>
INLINE auto lined_keys_for(int fold) {
  return fold == 1   ? lined_keys<P, T, 1>
         : fold == 2 ? lined_keys<P, T, 2>
         : fold == 4 ? lined_keys<P, T, 4>
         : fold == 8 ? lined_keys<P, T, VL < 8 ? VL : 8>
                     : lined_keys<P, T, VL < 16 ? VL : 16>;
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
