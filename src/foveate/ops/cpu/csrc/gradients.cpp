// Backward of a call. A unit of work is the query rows of one key/value head, or one part of them:
// it alone adds to its sums of dK and dV, in a fixed order, so results don't depend on timing.
#include <string.h>

#include <algorithm>
#include <vector>

#include "items.h"
#include "parallel.h"

namespace foveate {
namespace {

struct Unit {
  int32_t batch, kv_head, part;
  int64_t item0, item1, weight;
};

int64_t weight_of(const Item& it) { return (it.entry1 - it.entry0) * (it.row1 - it.row0) * it.heads; }

// Whether the threads, if they are alike, have about as much to do when each takes whole key/value
// heads; every tile counts as a full one.
bool balanced(const Call& c, int64_t threads) {
  bool shared = (!c.gbias_b && c.batch > 1) || (!c.gbias_h && c.kv_heads > 1);
  bool chained = c.grad_bias && c.gbias_q != 0 && shared;  // heads wait for each other
  int64_t heads = c.batch * c.kv_heads, group = c.heads / c.kv_heads;
  if (chained || heads < threads) return false;
  std::vector<int64_t> entries(heads, 1), load(threads, 0);
  int64_t total = 0;
  for (int64_t i = 0; i < heads; ++i) {
    for (int64_t h = 0; c.ptr && h < group; ++h) {
      const int64_t* ptr = c.ptr + group_of(c, i / c.kv_heads, i % c.kv_heads * group + h) * (c.q_tiles + 1);
      entries[i] += ptr[c.q_tiles] - ptr[0];
    }
    total += entries[i];
  }
  std::sort(entries.rbegin(), entries.rend());
  for (int64_t n : entries) *std::min_element(load.begin(), load.end()) += n;
  return *std::max_element(load.begin(), load.end()) * threads * 10 <= total * 11;
}

// Parts for each key/value head: enough for the threads, each worth more than adding its sums up.
int64_t parts_for(const Call& c, int64_t threads, bool whole) {
  int64_t heads = c.batch * c.kv_heads;
  if (whole || threads < 2 || heads >= 4 * threads || balanced(c, threads)) return 1;
  double pairs = work(c) / (double)(c.dim + c.value_dim) / (double)heads;
  int64_t worth = (int64_t)(pairs / (32.0 * (double)std::max<int64_t>(1, c.kv_len)));
  return std::max<int64_t>(1, std::min((4 * threads + heads - 1) / heads, worth));
}

struct Plan {
  std::vector<Item> items;
  std::vector<Unit> units;
};

// The part of each query tile, if all heads are to be cut at the same tiles: about equal work.
std::vector<int64_t> common_cut(const Call& c, const std::vector<Item>& items, int64_t parts) {
  std::vector<int64_t> weight(c.q_tiles, 0), part(c.q_tiles, 0);
  int64_t total = 0, done = 0;
  for (const Item& it : items) {
    weight[it.tile] += weight_of(it) + 1;
    total += weight_of(it) + 1;
  }
  for (int64_t t = 0; t < c.q_tiles; ++t) {
    part[t] = std::min(parts - 1, done * parts / std::max<int64_t>(1, total));
    done += weight[t];
  }
  return part;
}

Plan make_plan(const Call& c, int64_t parts, int64_t blocks) {
  Plan plan;
  std::vector<int64_t> ends;
  int64_t group = c.heads / c.kv_heads;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      int64_t begin = (int64_t)plan.items.size();
      add_items(c, b, h * group, (h + 1) * group, blocks, &plan.items);
      // Heads of a tile one after the other: they meet the same keys.
      std::stable_sort(plan.items.begin() + begin, plan.items.end(),
                       [](const Item& x, const Item& y) { return x.tile < y.tile; });
      ends.push_back((int64_t)plan.items.size());
    }
  // Rows of a bias shared by heads must be in the same part for all of them.
  bool common = c.grad_bias && c.gbias_q != 0;
  std::vector<int64_t> cut;
  if (common) cut = common_cut(c, plan.items, parts);
  int64_t at = 0;
  for (int64_t n = 0; n < (int64_t)ends.size(); ++n) {
    int64_t total = 0, done = 0;
    for (int64_t i = at; i < ends[n]; ++i) total += weight_of(plan.items[i]) + 1;
    for (int64_t p = 0; p < parts; ++p) {
      Unit u = {(int32_t)(n / c.kv_heads), (int32_t)(n % c.kv_heads), (int32_t)p, at, at, 0};
      while (at < ends[n] && (p == parts - 1 || (common ? cut[plan.items[at].tile] <= p
                                                        : (done + u.weight) * parts < total * (p + 1))))
        u.weight += weight_of(plan.items[at++]) + 1;
      done += u.weight;
      u.item1 = at;
      plan.units.push_back(u);
    }
  }
  return plan;
}

// Units that add to the same elements of the bias's gradient are run one after the other.
std::vector<std::vector<int64_t>> chains(const Call& c, const Plan& plan, int64_t parts) {
  std::vector<std::vector<int64_t>> all;
  bool dense = c.grad_bias && c.gbias_q != 0;
  int64_t nb = !dense || c.gbias_b ? c.batch : 1, nh = !dense || c.gbias_h ? c.kv_heads : 1;
  all.resize(nb * nh * parts);
  for (int64_t i = 0; i < (int64_t)plan.units.size(); ++i) {
    const Unit& u = plan.units[i];
    int64_t b = nb > 1 ? u.batch : 0, h = nh > 1 ? u.kv_head : 0;
    all[(b * nh + h) * parts + u.part].push_back(i);
  }
  auto weight = [&](const std::vector<int64_t>& chain) {
    int64_t w = 0;
    for (int64_t i : chain) w += plan.units[i].weight;
    return w;
  };
  std::stable_sort(all.begin(), all.end(), [&](const auto& x, const auto& y) { return weight(x) > weight(y); });
  return all;
}

template <class F> void collect_all(const Call& c, const Rows& to, int64_t rows, int64_t dim, int64_t heads,
                                    int64_t threads, F run) {
  int64_t piece = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, dim)), n = (rows + piece - 1) / piece;
  for_each(c.batch * heads * n, threads, [&](int64_t i, int64_t) {
    int64_t bh = i / n, first = i % n * piece;
    for (int64_t r = first; r < std::min(rows, first + piece); ++r)
      run(bh, r, (char*)to.data + (bh / heads * to.b + bh % heads * to.h + r * to.l) * (c.dtype == F32 ? 4 : 2));
    return true;
  });
}

}  // namespace

int backward(const Call& call) {
  Call c = call;
  const Kernels* k = chosen_kernels();
  int64_t threads = threads_for(c.threads, 2.5 * work(c));
  // Blocks that share a step share its way of dK and dV through memory.
  int64_t room = std::max<int64_t>(256 << 10, near_cache() / 2);
  int64_t blocks = blocks_for(c, false, threads, ROWS * (3 * c.dim + 2 * c.value_dim) * 4, room);
  if (!c.ptr) make_dense(&c, blocks);
  bool placed = true;
  if (c.q_index.data) {
    Inverse inverse = invert(c);
    placed = !inverse.repeated && !inverse.missing;
  }
  // Through q_index a query's rows may lie in any tile: parts would add to one row of the bias.
  bool scattered = c.q_index.data && c.grad_bias && c.gbias_q != 0;
  int64_t parts = parts_for(c, threads, !placed || scattered);
  Plan plan = make_plan(c, parts, blocks);
  int64_t kd = padded(c.dim, 16), vd = padded(c.value_dim, 16);
  // With one part, fp32 sums may be the result itself.
  bool direct_k = parts == 1 && c.dtype == F32 && c.dim % 16 == 0;
  bool direct_v = parts == 1 && c.dtype == F32 && c.value_dim % 16 == 0;
  int64_t units = (int64_t)plan.units.size();
  Buffer shared(parts > 1 ? units * c.kv_len * (kd + vd) : 0);
  std::vector<float> wide_queries(placed ? 0 : c.batch * c.heads * c.q_len * c.dim);
  int64_t group = c.heads / c.kv_heads, bias_heads = c.gbias_h ? group : 1;
  int64_t bias_keys = !c.gbias_k ? 1 : c.bias_count ? c.bias_count : c.kv_len;
  bool per_key = c.grad_bias && c.gbias_q == 0;
  std::vector<float> bias_sums(per_key ? units * bias_heads * bias_keys : 0);
  int64_t own = (direct_k ? 0 : c.kv_len * kd) + (direct_v ? 0 : c.kv_len * vd);
  if (parts > 1) own = 0;
  int64_t bytes = k->backward_bytes(c, blocks);
  auto all = chains(c, plan, parts);
  int64_t item_size = c.dtype == F32 ? 4 : 2;
  large_pages(c.grad_query.data, c.batch * c.heads * c.q_len * c.dim * item_size);
  large_pages(c.grad_key.data, c.batch * c.kv_heads * c.kv_len * c.dim * item_size);
  large_pages(c.grad_value.data, c.batch * c.kv_heads * c.kv_len * c.value_dim * item_size);
  if (parts > 1) large_pages(shared.data, units * c.kv_len * (kd + vd) * 4);
  bool ok = for_each((int64_t)all.size(), threads, [&](int64_t i, int64_t) {
    for (int64_t n : all[i]) {
      const Unit& u = plan.units[n];
      Arena* arena = thread_arena(bytes);
      Arena* sums_arena = thread_sums(own * 4 + 128);
      if (!arena || !sums_arena) return false;
      large_pages(sums_arena->data, own * 4);
      auto home = [&](const Rows& x) { return (char*)x.data + (u.batch * x.b + u.kv_head * x.h) * item_size; };
      float* base = parts > 1 ? shared.data + n * c.kv_len * (kd + vd) : (float*)sums_arena->data;
      Sums s{};
      s.key = direct_k ? (float*)home(c.grad_key) : base;
      s.value = direct_v ? (float*)home(c.grad_value) : base + (direct_k ? 0 : c.kv_len * kd);
      s.key_row = kd;
      s.value_row = vd;
      memset(s.key, 0, c.kv_len * kd * 4);
      memset(s.value, 0, c.kv_len * vd * 4);
      s.query = placed ? nullptr : wide_queries.data();
      if (per_key) {
        s.bias_h = c.gbias_h ? bias_keys : 0;
        s.bias_k = c.gbias_k ? 1 : 0;
        // Heads are numbered through the call; the sums hold this unit's only.
        s.bias = bias_sums.data() + n * bias_heads * bias_keys - u.kv_head * group * s.bias_h;
      } else if (c.grad_bias) {
        s.bias = c.grad_bias + u.batch * c.gbias_b;
        s.bias_h = c.gbias_h;
        s.bias_q = c.gbias_q;
        s.bias_k = c.gbias_k;
      }
      for (int64_t j = u.item0; j < u.item1; ++j) k->backward(c, plan.items[j], arena, s);
      if (parts > 1) continue;
      for (int64_t r = 0; r < c.kv_len; ++r) {
        if (!direct_k) k->collect(c, s.key + r * kd, 1, 0, c.dim, home(c.grad_key) + r * c.grad_key.l * item_size);
        if (!direct_v) k->collect(c, s.value + r * vd, 1, 0, c.value_dim, home(c.grad_value) + r * c.grad_value.l * item_size);
      }
    }
    return true;
  });
  if (!ok) return 1;
  if (parts > 1) {
    int64_t stride = c.kv_len * (kd + vd);
    collect_all(c, c.grad_key, c.kv_len, c.dim, c.kv_heads, threads, [&](int64_t bh, int64_t r, void* to) {
      k->collect(c, shared.data + bh * parts * stride + r * kd, parts, stride, c.dim, to);
    });
    collect_all(c, c.grad_value, c.kv_len, c.value_dim, c.kv_heads, threads, [&](int64_t bh, int64_t r, void* to) {
      k->collect(c, shared.data + bh * parts * stride + c.kv_len * kd + r * vd, parts, stride, c.value_dim, to);
    });
  }
  if (!placed)
    collect_all(c, c.grad_query, c.q_len, c.dim, c.heads, threads, [&](int64_t bh, int64_t r, void* to) {
      k->collect(c, wide_queries.data() + (bh * c.q_len + r) * c.dim, 1, 0, c.dim, to);
    });
  if (per_key)
    for (const Unit& u : plan.units) {
      int64_t n = &u - plan.units.data();
      for (int64_t h = 0; h < bias_heads; ++h) {
        float* to = c.grad_bias + u.batch * c.gbias_b + (u.kv_head * group + h) * c.gbias_h;
        const float* from = bias_sums.data() + (n * bias_heads + h) * bias_keys;
        for (int64_t j = 0; j < bias_keys; ++j) to[j] += from[j];
      }
    }
  return 0;
}

}  // namespace foveate
