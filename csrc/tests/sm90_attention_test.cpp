// The numbers of the sm_90a attention kernel and its protocol of barriers, checked without a GPU. Run by ctest.
#include "sgld/sm90_attention.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "expect.h"

namespace {

using namespace sgld;

// What the copy engine writes for a box of 64 elements: the 16-byte piece `piece` of a row, by bits 4 to 6 of its
// address exchanged with bits 7 to 9.
int copied(int row, int piece) {
  const int address = row * kSm90RowBytes + piece * 16;
  return address ^ (address >> 7 & 7) << 4;
}

// Where wgmma looks for an element of an operand, by its canonical layouts with the 128-byte swizzle. Along K: groups of
// 8 rows of M or N at `stride`, the elements of a row next to each other. Along M or N: 64 elements next to each other, the
// next 64 at `leading`; 8 rows of K at 128 bytes, the next 8 at `stride`. The swizzle is of the address itself.
struct Descriptor {
  uint32_t address, leading, stride;
  explicit Descriptor(uint64_t bits)
      : address((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    expect(bits >> 62 == 1, "the swizzle is that of 128 bytes");
    expect((bits >> 46 & 0xffff & ~0xc000u) == 0, "no base offset");
  }
  static uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
  uint32_t along_k(int mn, int k) const {
    return swizzle(address + mn / 8 * stride + mn % 8 * kSm90RowBytes + k * 2);
  }
  uint32_t along_mn(int mn, int k) const {
    return swizzle(address + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride +
                   k % 8 * kSm90RowBytes);
  }
};

// The address of element [row, column] of a tile of `rows` rows that the copy engine brought.
uint32_t element(uint32_t base, int rows, int row, int column) {
  return base + column / kSm90Column * rows * kSm90RowBytes +
         copied(row, column % kSm90Column / 8) + column % 8 * 2;
}

void the_swizzle_is_that_of_the_copy_engine() {
  for (int row = 0; row < 256; ++row)
    for (int piece = 0; piece < 8; ++piece)
      expect(sm90_swizzled(row, piece) == copied(row, piece), "row " + std::to_string(row));
}

void descriptors_find_every_element() {
  for (const int dim : {64, 128}) {
    const std::string at = " at head dim " + std::to_string(dim);
    const int keys = sm90_keys(dim);
    const Sm90Shared shared = sm90_shared(dim);
    const uint32_t base = 3 * kSm90GroupBytes;
    for (int step = 0; step < dim / 16; ++step) {
      for (int consumer = 0; consumer < kSm90Consumers; ++consumer) {
        const uint32_t q = base + shared.q + consumer * kSm90Rows * kSm90RowBytes;
        const Descriptor d(sm90_descriptor(q + sm90_step_along_row(step, kSm90Queries), 0));
        for (int row = 0; row < kSm90Rows; ++row)
          for (int k = 0; k < 16; ++k)
            expect(d.along_k(row, k) == element(base + shared.q, kSm90Queries,
                                                consumer * kSm90Rows + row, step * 16 + k),
                   "queries" + at);
      }
      for (int stage = 0; stage < kSm90Stages; ++stage) {
        const uint32_t k_base = base + shared.k + stage * sm90_tile_bytes(keys, dim);
        const Descriptor d(sm90_descriptor(k_base + sm90_step_along_row(step, keys), 0));
        for (int row = 0; row < keys; ++row)
          for (int k = 0; k < 16; ++k)
            expect(d.along_k(row, k) == element(k_base, keys, row, step * 16 + k), "keys" + at);
      }
    }
    for (int stage = 0; stage < kSm90Stages; ++stage) {
      const uint32_t v = base + shared.v + stage * sm90_tile_bytes(keys, dim);
      for (int step = 0; step < keys / 16; ++step) {
        const Descriptor d(sm90_descriptor(v + sm90_step_down(step), keys * kSm90RowBytes));
        for (int column = 0; column < dim; ++column)
          for (int k = 0; k < 16; ++k)
            expect(d.along_mn(column, k) == element(v, keys, step * 16 + k, column), "values" + at);
      }
    }
  }
}

void a_tile_is_what_the_instructions_take() {
  for (const int dim : {64, 128}) {
    const int keys = sm90_keys(dim);
    const Sm90Shared shared = sm90_shared(dim);
    expect(keys % 16 == 0 && keys <= 256, "keys of a product and of a box");
    for (const int offset : {shared.q, shared.k, shared.v, sm90_tile_bytes(keys, dim)})
      expect(offset % kSm90GroupBytes == 0, "tiles start with a whole group");
    expect(shared.barriers % 8 == 0, "barriers are aligned");
    expect(sm90_shared_bytes(dim) <= 227 * 1024, "shared memory at " + std::to_string(dim));
  }
  expect(
      kSm90Warpgroup * (kSm90ProducerRegisters + kSm90Consumers * kSm90ConsumerRegisters) <= 65536,
      "registers");
}

void accumulators_cover_their_rows_once() {
  constexpr int kKeys = 176;
  std::vector<int> seen(kSm90Rows * kKeys);
  for (int thread = 0; thread < kSm90Warpgroup; ++thread)
    for (int i = 0; i < kKeys / 2; ++i) {
      const int row = sm90_row(thread, i), column = sm90_column(thread, i);
      ++seen[row * kKeys + column];
      if (i % 2 == 0) expect(sm90_column(thread, i + 1) == column + 1, "pairs");
      // The kernel keeps two rows a thread, told apart by bit 1 of the register.
      expect(row == sm90_row(thread, 2 * (i / 2 % 2)), "two rows a thread");
    }
  for (const int count : seen) expect(count == 1, "every score once");
}

void tiles_cover_every_query_of_every_head_once() {
  constexpr int blocks = 5, heads = 3, sequences = 4;
  std::vector<int> seen(blocks * heads * sequences);
  const unsigned grid = sm90_grid(blocks * heads * sequences, 7);
  for (unsigned block = 0; block < grid; ++block)
    for (int64_t index = block; index < blocks * heads * sequences; index += grid) {
      const Sm90Tile tile = sm90_tile(index, blocks, heads);
      expect(tile.first_query % kSm90Queries == 0 && tile.head < heads, "inside");
      ++seen[(tile.sequence * heads + tile.head) * blocks + tile.first_query / kSm90Queries];
    }
  for (const int count : seen) expect(count == 1, "every tile once");
  expect(sm90_grid(3, 132) == 3 && sm90_grid(1000, 132) == 132, "grid");
  expect(sm90_steps(0, 176) == 0 && sm90_steps(176, 176) == 1 && sm90_steps(177, 176) == 2,
         "steps");
}

// ---- the protocol: producer and consumers as machines that a random order advances ----

// A barrier in shared memory: complete when its arrivals and bytes are there. Bytes arrive at once in this model.
struct Barrier {
  int arrivals = 1, pending = 1;
  uint32_t phase = 0;
  void arrive() {
    if (--pending == 0) {
      pending = arrivals;
      phase ^= 1;
    }
  }
  // The wait on a parity passes when the phase of that parity is complete.
  bool passes(uint32_t parity) const { return phase != parity; }
};

struct Stage {
  Barrier full, empty;
  int holds = -1;  // the number of the tile that was copied here
  int readers = 0;
};

struct Machine {
  Stage k[kSm90Stages], v[kSm90Stages], q;
  int turn[kSm90Consumers] = {};  // arrivals at the named barrier of a consumer
  int in_products = -1;           // the consumer whose turn it is
  std::vector<int> steps;         // of each tile of the block
};

struct Producer {
  Machine& m;
  size_t tile = 0;
  int at = -1, part = 0;  // part 0: queries, 1: keys, 2: values
  int copies = 0;
  Sm90Ring ring;
  uint32_t q_phase = 0;

  static void fill(Stage& stage, int number) {
    expect(stage.readers == 0, "a stage is overwritten while it is read");
    stage.holds = number;
    stage.full.arrive();
  }
  bool done() const { return tile == m.steps.size(); }
  bool advance() {
    if (part == 0) {
      if (!m.q.empty.passes(q_phase ^ 1)) return false;
      q_phase ^= 1;
      fill(m.q, static_cast<int>(tile));
      at = m.steps[tile] - 1;
      part = 1;
    } else if (at < 0) {
      ++tile;
      part = 0;
    } else if (part == 1) {
      if (!m.k[ring.stage].empty.passes(ring.phase ^ 1)) return false;
      fill(m.k[ring.stage], copies);
      part = 2;
    } else {
      if (!m.v[ring.stage].empty.passes(ring.phase ^ 1)) return false;
      fill(m.v[ring.stage], copies++);
      ring.next();
      --at;
      part = 1;
    }
    return true;
  }
};

struct Consumer {
  Machine& m;
  int id;
  size_t tile = 0;
  int step = 0, part = 0;
  int keys_seen = 0, values_seen = 0;
  Sm90Ring k_ring, v_ring;
  uint32_t q_phase = 0;

  bool done() const { return tile == m.steps.size(); }

  bool begin(Stage& stage, uint32_t phase, int number) {
    if (!stage.full.passes(phase)) return false;
    expect(stage.holds == number, "a stage holds what is wanted");
    ++stage.readers;
    return true;
  }
  static void end(Stage& stage) {
    --stage.readers;
    for (int warp = 0; warp < 4; ++warp) stage.empty.arrive();
  }
  Stage& keys() { return m.k[k_ring.stage]; }
  Stage& values() { return m.v[v_ring.stage]; }

  bool advance() {
    const int steps = m.steps[tile];
    switch (part) {
      case 0:  // queries
        if (!begin(m.q, q_phase, static_cast<int>(tile))) return false;
        q_phase ^= 1;
        part = steps > 0 ? 1 : 9;
        return true;
      case 1:  // the first keys
        if (!begin(keys(), k_ring.phase, keys_seen)) return false;
        part = 2;
        return true;
      case 2:
        end(keys());
        k_ring.next();
        ++keys_seen;
        if (steps > 1 && id == 1) ++m.turn[0];
        step = steps - 2;
        part = step >= 0 ? 3 : 7;
        return true;
      case 3:
        if (!begin(keys(), k_ring.phase, keys_seen)) return false;
        part = 4;
        return true;
      case 4:
        if (!begin(values(), v_ring.phase, values_seen)) return false;
        part = 5;
        return true;
      case 5:  // wait for the turn, start both products, pass the turn on
        if (m.turn[id] == 0) return false;
        --m.turn[id];
        expect(m.in_products == -1 || m.in_products != id, "turns alternate");
        m.in_products = id;
        if (id == 0 || step > 0) ++m.turn[id ^ 1];
        expect(m.turn[id ^ 1] <= 1, "a named barrier is announced once a turn");
        part = 6;
        return true;
      case 6:
        end(keys());
        k_ring.next();
        ++keys_seen;
        end(values());
        v_ring.next();
        ++values_seen;
        part = --step >= 0 ? 3 : 7;
        return true;
      case 7:  // the last values
        if (!begin(values(), v_ring.phase, values_seen)) return false;
        part = 8;
        return true;
      case 8:
        end(values());
        v_ring.next();
        ++values_seen;
        part = 9;
        return true;
      default:  // the store, in the room of the queries
        m.in_products = m.in_products == id ? -1 : m.in_products;
        end(m.q);
        ++tile;
        part = 0;
        return true;
    }
  }
};

void no_order_of_events_stops_or_overtakes_the_rings() {
  std::mt19937 random(11);
  for (int round = 0; round < 400; ++round) {
    Machine m;
    for (auto* ring : {m.k, m.v})
      for (int i = 0; i < kSm90Stages; ++i) ring[i].empty.arrivals = ring[i].empty.pending = 8;
    m.q.empty.arrivals = m.q.empty.pending = 8;
    const int tiles = 1 + static_cast<int>(random() % 5);
    for (int i = 0; i < tiles; ++i) m.steps.push_back(static_cast<int>(random() % 7));
    Producer producer{m, 0, -1, 0, 0, {}, 0};
    Consumer consumers[kSm90Consumers] = {{m, 0, 0, 0, 0, 0, 0, {}, {}, 0},
                                          {m, 1, 0, 0, 0, 0, 0, {}, {}, 0}};
    int stuck = 0;
    // One of the three may be much faster than the others.
    const unsigned favourite = random() % 4;
    while (stuck < 2000 && !(producer.done() && consumers[0].done() && consumers[1].done())) {
      const unsigned who = random() % 4 == 0 || favourite == 3 ? random() % 3 : favourite;
      const bool moved = who == 0 ? !producer.done() && producer.advance()
                                  : !consumers[who - 1].done() && consumers[who - 1].advance();
      stuck = moved ? 0 : stuck + 1;
    }
    expect(consumers[0].done() && consumers[1].done() && producer.done(), "nobody waits for ever");
    expect(m.turn[0] == 0 && m.turn[1] == 0, "every announcement was used");
    if (failures > 0) return;
  }
}

}  // namespace

int main() {
  the_swizzle_is_that_of_the_copy_engine();
  descriptors_find_every_element();
  a_tile_is_what_the_instructions_take();
  accumulators_cover_their_rows_once();
  tiles_cover_every_query_of_every_head_once();
  no_order_of_events_stops_or_overtakes_the_rings();
  if (failures == 0) std::puts("sm90 attention: all passed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
