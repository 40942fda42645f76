#include "items.h"

#include <math.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

namespace foveate {

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
static int64_t heads_together(const Call& c) {
  return std::gcd(c.heads / c.kv_heads, c.ptr ? c.heads / c.groups_h : c.heads);
}

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
  // To read a key takes longer than few rows' products with it: as long as 4 multiplications a byte.
  double rows = (double)std::max<int64_t>(1, std::min(c.q_len, c.ptr ? c.q_tile : c.q_len) * heads_together(c));
  return area * (double)(c.dim + c.value_dim) * std::max(1.0, (c.dtype == F32 ? 16 : 8) / rows);
}

int64_t near_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return std::min<int64_t>(1 << 20, bytes);
#endif
  return 1 << 20;
}

int64_t blocks_for(const Call& c, bool tiles, int64_t threads, int64_t block_bytes, int64_t room) {
  int64_t blocks = std::min<int64_t>(tiles ? BLOCKS : FEWER_BLOCKS, std::max<int64_t>(1, room / block_bytes));
  int64_t rows = c.batch * c.heads * c.q_len;
  while (blocks > 1 && threads > 1 && rows / (ROWS * blocks) < 6 * threads) blocks /= 2;
  return blocks;
}

void add_items(const Call& c, int64_t batch, int64_t from, int64_t to, int64_t blocks,
               std::vector<Item>* items) {
  int64_t together = heads_together(c), rows = query_rows(c);
  for (int64_t h = from; h < to; h += together) {
    const int64_t* ptr = c.ptr ? c.ptr + group_of(c, batch, h) * (c.q_tiles + 1) : nullptr;
    for (int64_t t = c.q_tiles - 1; t >= 0; --t) {
      int64_t n = std::min(c.q_tile, rows - t * c.q_tile);
      int64_t e0 = ptr ? ptr[t] : 0, e1 = ptr ? ptr[t + 1] : c.kv_tiles;
      for (int64_t r = 0; r < n; r += ROWS * blocks) {
        int64_t m = std::min(n - r, ROWS * blocks);
        int64_t fit = m <= PACKED ? blocks * (ROWS / m)
                                  : std::max<int64_t>(1, blocks / ((m + ROWS - 1) / ROWS));
        for (int64_t i = 0; i < together; i += fit)
          items->push_back({(int32_t)batch, (int32_t)(h + i), (int32_t)std::min(fit, together - i),
                            (int32_t)t, (int32_t)r, (int32_t)(r + m), 0, 0, e0, e1});
      }
    }
  }
}

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

}  // namespace foveate
