// Few rows against keys that all of them see and that lie one behind the other, as in decoding.
#pragma once
#include "few.h"
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

// Whether they are long runs, which pay for the processor's finding out where each leads.
INLINE bool long_runs(const Stream& stream) {
  Lines run = {&stream, stream.it->entry0, 0, 0, 0};
  int64_t keys = 0, runs = 0;
  for (; run.next(1 << 20); ++runs) keys += run.n;
  return keys >= 512 * runs;
}

// A block of few rows against all of those, a chunk of keys at a time: then keys and values stay two
// streams that the processor itself reads ahead, with the next chunk's whole lines fetched one for one.
// In long runs keys are read nearly one by one and values by whole rows, up to a page of 4 KiB at a
// time, which is how far the processor foresees, and only jumps are told to it.
template <class P, class T, int F, int NV> struct LinedKeys {
  static void of(const Call& c, const Item& it, Running& run, const Stream& stream, int64_t kv_head,
                 float scale, float* score, float* weight) {
    alignas(64) float top[VL], alpha[VL];
    const char* keys = (const char*)row_at<T>(c.key, it.batch, kv_head, 0);
    const char* vals = (const char*)row_at<T>(c.value, it.batch, kv_head, 0);
    int64_t ks = c.key.l * (int64_t)sizeof(T), vs = c.value.l * (int64_t)sizeof(T);
    bool dense = ks == c.dim * (int64_t)sizeof(T) && vs == c.value_dim * (int64_t)sizeof(T) && VL == 16;
    auto meet = [&](auto k, auto v, int n) __attribute__((always_inline)) {
      scores_folded<P, F, NV>(run.q, k, n, elements<P>((int)c.dim) / (F * NV), score);
      settle<F>(score, n, false, 0, 0, nullptr, nullptr, top);
      const float* p = weigh<P, T, F>(score, n, top, scale, run, alpha, weight);
      values_by_row<P, F>(p, v, n, (int)c.value_dim, run.o, row_floats(c), alpha, run.first);
      run.first = false;
    };
    // Where several keys are read abreast, short ones only; pairs of values are two rows abreast as well.
    int64_t widest = F >= 8 || c.dim < c.value_dim ? c.value_dim : c.dim;
    bool streamed = F >= 4 && dense && widest <= (F >= 8 || P::PAIR == 1 ? 128 : 64) && long_runs(stream);
    int page = widest <= 64 ? 16 * P::PAIR : 8 * P::PAIR, least = F == 1 || (F <= 4 && P::PAIR == 2) ? 32 : 16;
    int chunk = !streamed ? least : page < F ? F : page;
    Lines now = {&stream, stream.it->entry0, 0, 0, 0};
    bool more = now.next(chunk);
    while (more) {
      Lines then = now;
      more = then.next(chunk);
      int64_t ahead = more ? then.first - now.first : 0;
      const char *k = keys + now.first * ks, *v = vals + now.first * vs;
      if (F >= 4 && streamed) {
        if (ahead && ahead != now.n) {
          for (int64_t i = 0; i < then.n * ks; i += 64) prefetch(k + ahead * ks + i);
          for (int64_t i = 0; i < then.n * vs; i += 64) prefetch(v + ahead * vs + i);
        }
        if (F < 8 && widest <= 64) meet(Streamed<64>{k, ks}, Streamed<64>{v, vs}, now.n);
        else meet(Streamed<128>{k, ks}, Streamed<128>{v, vs}, now.n);
      } else {
        meet(Lined{k, ks, ahead * ks, dense}, Lined{v, vs, ahead * vs, dense}, now.n);
      }
      now = then;
    }
  }
};

template <class P, class T> INLINE auto lined_keys_for(const Running& run) {
  return few_for<LinedKeys, P, T>(run);
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
