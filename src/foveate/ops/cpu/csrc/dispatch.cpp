// The exported functions: choose the kernels, cut the call into items, share them out.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <new>
#include <vector>

#include "items.h"
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

[[maybe_unused]] const int watched = pthread_atfork(before_fork, nullptr, after_fork);

// Whether there are tiles of bf16 and the system lets this process use them. It has to be asked, once for all
// threads; from then on it refuses signal stacks that are too small for tiles.
[[maybe_unused]] bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found = {portable_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  [[maybe_unused]] bool pairs = wide && __builtin_cpu_supports("avx512bf16");
#if defined(FOVEATE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2_kernels());
#endif
#if defined(FOVEATE_AVX512)
  if (wide) found.push_back(avx512_kernels());
#endif
#if defined(FOVEATE_AVX512BF16)
  if (pairs) found.push_back(avx512bf16_kernels());
#endif
#if defined(FOVEATE_AMX)
  if (pairs && tiles_granted()) found.push_back(amx_kernels());
#endif
#endif
  return found;
}
const Kernels*& chosen() {
  static const Kernels* k = runnable().back();
  return k;
}

constexpr int64_t LONGEST = 16384;  // keys that few rows are summed over in one go

// Where there are fewer items than threads could use, cut their lists; also those that are so long
// that rounding would add up, if there are few rows to bring together.
int64_t split(const Call& c, std::vector<Item>* items, int64_t threads) {
  int64_t most = 0;
  for (const Item& it : *items) most = std::max(most, it.entry1 - it.entry0);
  int64_t wanted = (3 * threads + (int64_t)items->size() - 1) / std::max<int64_t>(1, items->size());
  int64_t parts = std::min(wanted, most * c.kv_tile / 512);
  if (threads < 2 || (int64_t)items->size() >= 3 * threads) parts = 1;
  if (c.q_len <= 16) parts = std::max(parts, most * c.kv_tile / LONGEST);
  if (parts < 2) return 1;
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

int forward(const Call& call) {
  Call c = call;
  const Kernels* k = chosen();
  int64_t threads = threads_for(c.threads, work(c));
  bool tiles = k->tiles && c.dtype == BF16;
  int64_t blocks = blocks_for(c, tiles, threads, ROWS * (c.dim + c.value_dim) * 4, tiles ? 512 << 10 : 256 << 10);
  int64_t rows = c.batch * c.heads * c.q_len;
  if (!c.ptr) make_dense(&c, blocks);
  Inverse inverse;
  if (c.q_index.data) inverse = invert(c);
  std::vector<Item> items;
  for (int64_t b = 0; b < c.batch; ++b) add_items(c, b, 0, c.heads, blocks, &items);
  int64_t parts = split(c, &items, threads);
  heavy_first(&items);
  bool merged = parts > 1 || inverse.repeated || inverse.missing;
  int64_t slots = merged ? parts * c.batch * c.heads * query_rows(c) : 0;
  Buffer sums(slots * (c.value_dim + 2));
  Partial part = {sums.data, sums.data + slots * c.value_dim, sums.data + slots * (c.value_dim + 1)};
  int64_t bytes = k->forward_bytes(c);
  large_pages(c.out.data, rows * c.value_dim * (c.dtype == F32 ? 4 : 2));
  large_pages(sums.data, slots * (c.value_dim + 2) * 4);
  bool ok = for_each((int64_t)items.size(), threads, [&](int64_t i, int64_t after) {
    Arena* arena = thread_arena(bytes);
    if (!arena) return false;
    k->forward(c, items[i], after < 0 ? nullptr : &items[after], arena, merged ? &part : nullptr);
    return true;
  });
  if (ok && merged) {
    Merge m{};
    m.parts = parts;
    m.batches = inverse.batches;
    m.heads = inverse.heads;
    if (c.q_index.data) m.first = inverse.first.data(), m.rows = inverse.rows.data();
    int64_t piece = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, c.value_dim));
    for_each((rows + piece - 1) / piece, threads, [&](int64_t i, int64_t) {
      for (int64_t r = i * piece; r < std::min(rows, (i + 1) * piece); ++r) k->merge(c, part, m, r);
      return true;
    });
  }
  return ok ? 0 : 1;
}

}  // namespace

const Kernels* chosen_kernels() { return chosen(); }

}  // namespace foveate

// 0, or 1 when memory ran out.
EXPORT int foveate_forward(const foveate::Call* call) {
  try {
    return foveate::forward(*call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

EXPORT int foveate_backward(const foveate::Call* call) {
  try {
    return foveate::backward(*call);
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
