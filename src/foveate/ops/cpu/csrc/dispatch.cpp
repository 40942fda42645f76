// The exported functions: choose the kernels, cut the call into items, share them out.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "parallel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace foveate {

bool reserve(Arena* arena, int64_t bytes) {
  if (bytes <= arena->size) return true;
  free(arena->data);
  arena->size = 0;
  void* p = nullptr;
  if (posix_memalign(&p, 64, (size_t)padded(bytes, 4096))) p = nullptr;
  arena->data = (char*)p;
  if (p) arena->size = bytes;
  return p != nullptr;
}

namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found = {portable_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(FOVEATE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2_kernels());
#endif
#if defined(FOVEATE_AVX512)
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide) found.push_back(avx512_kernels());
#if defined(FOVEATE_AVX512BF16)
  if (wide && __builtin_cpu_supports("avx512bf16")) found.push_back(avx512bf16_kernels());
#endif
#endif
#endif
  return found;
}
const Kernels*& chosen() {
  static const Kernels* k = runnable().back();
  return k;
}

// Heaviest first in steps of half an octave; in between the given order, which keeps a head's keys
// in the cache, stays.
void heavy_first(std::vector<Item>* items) {
  auto level = [](const Item& it) {
    return (int)(2 * log2((double)(it.entry1 - it.entry0) * (it.row1 - it.row0) * it.heads + 1));
  };
  int most = 0, least = 1 << 20;
  for (const Item& it : *items) {
    int l = level(it);
    most = std::max(most, l);
    least = std::min(least, l);
  }
  if (most == least) return;
  std::vector<int64_t> start(most - least + 2, 0);
  for (const Item& it : *items) ++start[most - level(it) + 1];
  for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
  std::vector<Item> sorted(items->size());
  for (const Item& it : *items) sorted[start[most - level(it)]++] = it;
  items->swap(sorted);
}

int64_t query_rows(const Call& c) { return c.q_index.data ? c.q_index.n : c.q_len; }

// Heads that may share an item: one key/value head and one list.
int64_t heads_together(const Call& c) {
  return std::gcd(c.heads / c.kv_heads, c.ptr ? c.heads / c.groups_h : c.heads);
}

// Without a layout: every query tile lists every key tile.
void make_dense(Call* c, int64_t blocks) {
  c->groups_b = c->groups_h = 1;
  int64_t heads = std::min(heads_together(*c), blocks);
  c->q_tile = ROWS * std::max<int64_t>(1, blocks / heads);
  c->q_tiles = (c->q_len + c->q_tile - 1) / c->q_tile;
  c->kv_tile = 256;
  c->kv_tiles = (c->kv_len + c->kv_tile - 1) / c->kv_tile;
  c->entries = c->kv_tiles;
  c->patterns = c->lists = 0;
}

double work(const Call& c) {
  double area = c.ptr ? (double)c.entries * c.q_tile * c.kv_tile * (c.batch / c.groups_b) *
                            (c.heads / c.groups_h)
                      : (double)c.q_len * c.kv_len * c.batch * c.heads;
  if (c.ptr && c.q_len < c.q_tile) area *= (double)c.q_len / c.q_tile;
  return area * (double)(c.dim + c.value_dim);
}

std::vector<Item> forward_items(const Call& c, int64_t blocks) {
  std::vector<Item> items;
  int64_t together = heads_together(c), rows = query_rows(c);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; h += together) {
      const int64_t* ptr = c.ptr ? c.ptr + group_of(c, b, h) * (c.q_tiles + 1) : nullptr;
      for (int64_t t = c.q_tiles - 1; t >= 0; --t) {
        int64_t n = std::min(c.q_tile, rows - t * c.q_tile);
        int64_t e0 = ptr ? ptr[t] : 0, e1 = ptr ? ptr[t + 1] : c.kv_tiles;
        for (int64_t r = 0; r < n; r += ROWS * blocks) {
          int64_t m = std::min(n - r, ROWS * blocks);
          int64_t fit = m <= PACKED ? blocks * (ROWS / m) : std::max<int64_t>(1, blocks / ((m + ROWS - 1) / ROWS));
          for (int64_t i = 0; i < together; i += fit)
            items.push_back({(int32_t)b, (int32_t)(h + i), (int32_t)std::min(fit, together - i),
                             (int32_t)t, (int32_t)r, (int32_t)(r + m), 0, 0, e0, e1});
        }
      }
    }
  return items;
}

// Where there are fewer items than threads could use, cut their lists.
int64_t split(const Call& c, std::vector<Item>* items, int64_t threads) {
  int64_t most = 0;
  for (const Item& it : *items) most = std::max(most, it.entry1 - it.entry0);
  int64_t wanted = (3 * threads + (int64_t)items->size() - 1) / std::max<int64_t>(1, items->size());
  int64_t parts = std::min(wanted, most * c.kv_tile / 512);
  if (threads < 2 || (int64_t)items->size() >= 3 * threads || parts < 2) return 1;
  std::vector<Item> cut;
  for (const Item& it : *items)
    for (int64_t p = 0; p < parts; ++p) {
      Item piece = it;
      int64_t n = it.entry1 - it.entry0;
      piece.part = (int32_t)p;
      piece.entry0 = it.entry0 + n * p / parts;
      piece.entry1 = it.entry0 + n * (p + 1) / parts;
      cut.push_back(piece);
    }
  items->swap(cut);
  return parts;
}

struct Inverse {
  std::vector<int32_t> first, rows;
  int64_t batches = 1, heads = 1;
  bool repeated = false, missing = false;
};

// For each group of q_index, the virtual rows of every query.
Inverse invert(const Call& c) {
  Inverse v;
  const Table& t = c.q_index;
  v.batches = t.b ? c.batch : 1;
  v.heads = t.h ? c.groups_h : 1;
  v.first.assign(v.batches * v.heads * (c.q_len + 1), 0);
  v.rows.assign(v.batches * v.heads * t.n, 0);
  for (int64_t b = 0; b < v.batches; ++b)
    for (int64_t h = 0; h < v.heads; ++h) {
      const int32_t* index = t.data + b * t.b + h * t.h;
      int32_t* first = v.first.data() + (b * v.heads + h) * (c.q_len + 1);
      int32_t* rows = v.rows.data() + (b * v.heads + h) * t.n;
      auto real = [&](int64_t i) { return index[i] >= 0 && index[i] < c.q_len; };
      for (int64_t i = 0; i < t.n; ++i)
        if (real(i)) ++first[index[i] + 1];
      for (int64_t q = 0; q < c.q_len; ++q) {
        v.repeated |= first[q + 1] > 1;
        v.missing |= first[q + 1] == 0;
        first[q + 1] += first[q];
      }
      std::vector<int32_t> at(first, first + c.q_len);
      for (int64_t i = 0; i < t.n; ++i)
        if (real(i)) rows[at[index[i]]++] = (int32_t)i;
    }
  return v;
}

int forward(const Call& call) {
  Call c = call;
  const Kernels* k = chosen();
  int64_t threads = threads_for(c.threads, work(c));
  int64_t block_bytes = ROWS * (c.dim + c.value_dim) * 4;
  int64_t blocks = std::min<int64_t>(BLOCKS, std::max<int64_t>(1, (256 << 10) / block_bytes));
  int64_t rows = c.batch * c.heads * c.q_len;
  while (blocks > 1 && rows / (ROWS * blocks) < 6 * threads && threads > 1) blocks /= 2;
  if (!c.ptr) make_dense(&c, blocks);
  Inverse inverse;
  if (c.q_index.data) inverse = invert(c);
  std::vector<Item> items = forward_items(c, blocks);
  int64_t parts = split(c, &items, threads);
  heavy_first(&items);
  bool merged = parts > 1 || inverse.repeated || inverse.missing;
  std::vector<float> sums;
  Partial part{};
  if (merged) {
    int64_t slots = parts * c.batch * c.heads * query_rows(c);
    sums.resize(slots * (c.value_dim + 2));
    part = {sums.data(), sums.data() + slots * c.value_dim, sums.data() + slots * (c.value_dim + 1)};
  }
  int64_t bytes = k->forward_bytes(c);
  bool ok = for_each((int64_t)items.size(), threads, [&](int64_t i) {
    Arena* arena = thread_arena(bytes);
    if (!arena) return false;
    k->forward(c, items[i], arena, merged ? &part : nullptr);
    return true;
  });
  if (ok && merged) {
    Merge m{};
    m.parts = parts;
    m.batches = inverse.batches;
    m.heads = inverse.heads;
    if (c.q_index.data) m.first = inverse.first.data(), m.rows = inverse.rows.data();
    int64_t piece = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, c.value_dim));
    for_each((rows + piece - 1) / piece, threads, [&](int64_t i) {
      for (int64_t r = i * piece; r < std::min(rows, (i + 1) * piece); ++r) k->merge(c, part, m, r);
      return true;
    });
  }
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace foveate

// 0, or 1 when memory ran out.
EXPORT int foveate_forward(const foveate::Call* call) {
  try {
    return foveate::forward(*call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

EXPORT const char* foveate_isa() { return foveate::chosen()->name; }

// Use the kernels of that name, if this machine runs them; 0 if it does.
EXPORT int foveate_use(const char* name) {
  for (const foveate::Kernels* k : foveate::runnable())
    if (!strcmp(k->name, name)) {
      foveate::chosen() = k;
      return 0;
    }
  return 1;
}

EXPORT int64_t foveate_call_bytes() { return sizeof(foveate::Call); }
