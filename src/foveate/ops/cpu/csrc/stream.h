// The keys that an item visits, as a stream cut into steps of at most KEYS keys. Small tiles and
// single keys share a step; keys that no row of the item may see never enter one.
#pragma once
#include "plan.h"
#include "simd.h"

namespace foveate {
namespace FOVEATE_ISA {

// Rows of one block: `heads` heads from `head0` on, rows row0 .. row0 + rows of the tile for each.
struct Block {
  int32_t head0, heads, row0, rows;
  uint64_t real;  // rows that are queries
};

struct Step {
  int n;
  int32_t key[KEYS];  // index of the real key
  uint64_t seen[BLOCKS][KEYS];
  // Per block: keys lo .. hi hold all that it sees (lo = hi: nothing); `whole`: all of them.
  int lo[BLOCKS], hi[BLOCKS];
  bool whole[BLOCKS];
};

INLINE uint64_t low_bits(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// One head's rows repeated for every head of the block.
INLINE uint64_t spread(uint64_t word, const Block& b) {
  word &= low_bits(b.rows);
  uint64_t all = word;
  for (int i = 1; i < b.heads; ++i) all |= word << (i * b.rows);
  return all & b.real;
}

struct Stream {
  const Call* c;
  const Item* it;
  const Block* block;
  int blocks;
  const int32_t *kv_index, *key_range, *row_range;
  int64_t entry, at;  // next entry, and the next slot in it
  int64_t slots, virtuals;
  uint64_t window[BLOCKS][KEYS];  // who sees each of the slots at .. at + KEYS
  int32_t keys[KEYS];
  int held, left;  // slots of the window; those not yet handed out start at held - left
  bool skips;      // whole tiles are somebody else's

  void start(const Call& call, const Item& item, const Block* b, int n) {
    c = &call;
    it = &item;
    block = b;
    blocks = n;
    entry = item.entry0;
    at = 0;
    held = left = 0;
    skips = false;
    slots = call.kv_tile;
    virtuals = call.kv_index.data ? call.kv_index.n : call.kv_len;
    kv_index = call.kv_index.data ? lookup(call, call.kv_index, item.batch, item.head0) : nullptr;
    key_range = call.key_range.data ? lookup(call, call.key_range, item.batch, item.head0) : nullptr;
    row_range = call.row_range.data ? lookup(call, call.row_range, item.batch, item.head0) : nullptr;
  }

  // The next step; false when the list is at its end.
  bool next(Step* s) {
    s->n = 0;
    bool plain = true;  // whole tiles only: `seen` is not filled in
    while (s->n < KEYS) {
      if (!left) {
        int run = skips ? 0 : whole_tile(s);
        if (run) {
          if (!plain) show_all(s, s->n, s->n + run);
          s->n += run;
          continue;
        }
        if (!fill()) break;
      }
      if (plain) show_all(s, 0, s->n);
      plain = false;
      int first = held - left;
      while (left && s->n < KEYS) {
        uint64_t any = 0;
        if (keys[first] >= 0)
          for (int b = 0; b < blocks; ++b) any |= s->seen[b][s->n] = window[b][first];
        if (any) s->key[s->n++] = keys[first];
        ++first;
        --left;
      }
    }
    for (int b = 0; b < blocks; ++b) {
      int lo = 0, hi = s->n;
      uint64_t all = ~0ull, real = block[b].real;
      if (!plain) {
        while (lo < hi && !s->seen[b][lo]) ++lo;
        while (hi > lo && !s->seen[b][hi - 1]) --hi;
        for (int j = lo; j < hi; ++j) all &= s->seen[b][j];
      }
      s->lo[b] = lo;
      s->hi[b] = hi;
      s->whole[b] = (all & real) == real;
    }
    return s->n > 0;
  }

  // How many keys of an entry's tile there are, if all of it is to be seen; else 0.
  int64_t whole_at(int64_t e) const {
    int32_t col = c->ptr ? c->cols[e] : (int32_t)e;
    if (kv_index || col < 0 || col >= c->kv_tiles || (c->ptr && c->kinds[e] != FULL)) return 0;
    int64_t left_of = virtuals - (int64_t)col * slots;
    return left_of > slots ? slots : left_of > 0 ? left_of : 0;
  }

 private:
  void show_all(Step* s, int from, int to) {
    for (int b = 0; b < blocks; ++b)
      for (int j = from; j < to; ++j) s->seen[b][j] = block[b].real;
  }

  // Keys of the current tile, as many as the step has room for, if all of it is to be seen.
  int whole_tile(Step* s) {
    if (entry >= it->entry1 || kv_index) return 0;
    int32_t col = c->ptr ? c->cols[entry] : (int32_t)entry;
    if (col < 0 || col >= c->kv_tiles || (c->ptr && c->kinds[entry] != FULL)) return 0;
    int64_t first = (int64_t)col * slots + at, limit = slots - at;
    if (limit > virtuals - first) limit = virtuals - first;
    if (limit <= 0) return 0;
    int n = (int)(limit < KEYS - s->n ? limit : KEYS - s->n);
    for (int j = 0; j < n; ++j) s->key[s->n + j] = (int32_t)first + j;
    at += n;
    if (n == limit) {
      ++entry;
      at = 0;
    }
    return n;
  }

  // Look into the next slots of the list.
  bool fill() {
    int32_t col, kind;
    for (;;) {
      if (entry >= it->entry1) return false;
      col = c->ptr ? c->cols[entry] : (int32_t)entry;
      kind = c->ptr ? c->kinds[entry] : FULL;
      int64_t limit = slots;
      if (col >= 0 && col < c->kv_tiles && virtuals - col * slots < slots)
        limit = virtuals - col * slots;
      if (skips && whole_at(entry)) {
        ++entry;
        at = 0;
        continue;
      }
      bool known = kind <= c->patterns && (kind >= 0 || (kind == KEY_RANGE && key_range) ||
                                           (kind == ROW_RANGE && row_range));
      if (at < limit && col >= 0 && col < c->kv_tiles + c->lists && known) {
        held = left = (int)(limit - at < KEYS ? limit - at : KEYS);
        break;
      }
      ++entry;
      at = 0;
    }
    bool listed = col >= c->kv_tiles;
    int64_t base = (int64_t)col * slots + at;
    const int32_t* list = listed ? c->gathered + (int64_t)(col - c->kv_tiles) * slots + at : nullptr;
    int32_t place[KEYS];  // virtual keys
    for (int j = 0; j < held; ++j) {
      int32_t v = listed ? list[j] : (int32_t)(base + j);
      if (v >= virtuals) v = -1;
      place[j] = v;
      if (kv_index && v >= 0) v = kv_index[v];
      keys[j] = v < c->kv_len ? v : -1;
    }
    for (int b = 0; b < blocks; ++b) see(kind, place, block[b], window[b]);
    at += held;
    return true;
  }

  void see(int32_t kind, const int32_t* place, const Block& b, uint64_t* word) {
    if (kind == FULL) {
      for (int j = 0; j < held; ++j) word[j] = b.real;
    } else if (kind > 0) {
      int64_t bytes = c->q_tile / 8, from = b.row0 / 8, shift = b.row0 % 8;
      int64_t n = bytes - from < 8 ? bytes - from : 8;
      const uint8_t* p = c->bits + ((int64_t)(kind - 1) * slots + at) * bytes + from;
      bool plain = b.heads == 1 && n == 8;
      for (int j = 0; j < held; ++j, p += bytes) {
        uint64_t w = 0;
        if (plain) {
          memcpy(&w, p, 8);
          word[j] = w & b.real;
          continue;
        }
        memcpy(&w, p, n);
        word[j] = spread(w >> shift, b);
      }
    } else if (kind == KEY_RANGE) {
      // Row r changes sides at its two ends; running exclusive-or gives the rows inside.
      uint64_t flip[KEYS + 1];
      for (int j = 0; j < held; ++j) word[j] = 0;
      bool rising = true;
      for (int j = 0; j < held; ++j) rising &= place[j] == place[0] + j;
      int64_t row = (int64_t)it->tile * c->q_tile + b.row0;
      if (rising && place[0] >= 0) {
        memset(flip, 0, sizeof flip);
        for (int r = 0; r < b.rows; ++r) {
          if (row + r >= c->key_range.n) break;
          int64_t lo = key_range[(row + r) * 2] - place[0], hi = key_range[(row + r) * 2 + 1] - place[0];
          lo = lo < 0 ? 0 : lo > held ? held : lo;
          hi = hi < lo ? lo : hi > held ? held : hi;
          flip[lo] ^= 1ull << r;
          flip[hi] ^= 1ull << r;
        }
        uint64_t inside = 0;
        for (int j = 0; j < held; ++j) word[j] = spread(inside ^= flip[j], b);
      } else {
        for (int j = 0; j < held; ++j) {
          uint64_t w = 0;
          for (int r = 0; r < b.rows && row + r < c->key_range.n; ++r)
            if (place[j] >= key_range[(row + r) * 2] && place[j] < key_range[(row + r) * 2 + 1])
              w |= 1ull << r;
          word[j] = spread(w, b);
        }
      }
    } else {  // ROW_RANGE
      int64_t row = (int64_t)it->tile * c->q_tile + b.row0;
      for (int j = 0; j < held; ++j) {
        word[j] = 0;
        if (place[j] < 0) continue;
        int64_t lo = row_range[(int64_t)place[j] * 2] - row, hi = row_range[(int64_t)place[j] * 2 + 1] - row;
        lo = lo < 0 ? 0 : lo;
        hi = hi > b.rows ? b.rows : hi;
        if (lo < hi) word[j] = spread(low_bits((int)hi) & ~low_bits((int)lo), b);
      }
    }
  }
};

// The blocks of an item; returns how many.
INLINE int make_blocks(const Call& c, const Item& it, Block* block) {
  int n = 0, rows = it.row1 - it.row0;
  if (rows <= PACKED) {
    int at_once = ROWS / rows;
    for (int h = 0; h < it.heads; h += at_once) {
      int heads = it.heads - h < at_once ? it.heads - h : at_once;
      block[n++] = {it.head0 + h, heads, it.row0, rows, low_bits(heads * rows)};
    }
  } else {
    for (int h = 0; h < it.heads; ++h)
      for (int r = it.row0; r < it.row1; r += ROWS) {
        int m = it.row1 - r < ROWS ? it.row1 - r : ROWS;
        block[n++] = {it.head0 + h, 1, r, m, low_bits(m)};
      }
  }
  return n;
}

// The query of each row of a block, -1 where there is none; clears those rows in `real`.
INLINE void block_rows(const Call& c, const Item& it, Block* b, int32_t* query) {
  int64_t base = (int64_t)it.tile * c.q_tile + b->row0;
  const int32_t* index = c.q_index.data ? lookup(c, c.q_index, it.batch, it.head0) : nullptr;
  for (int r = 0; r < b->rows; ++r) {
    int64_t v = base + r;
    int64_t q = index ? (v < c.q_index.n ? index[v] : -1) : v;
    if (q < 0 || q >= c.q_len) q = -1;
    for (int h = 0; h < b->heads; ++h) {
      query[h * b->rows + r] = (int32_t)q;
      if (q < 0) b->real &= ~(1ull << (h * b->rows + r));
    }
  }
}

}  // namespace FOVEATE_ISA
}  // namespace foveate
