// lora_apply_ on the CPU: rows sorted by adapter, then blocks of rows over the threads.
#include "lora_apply.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "lora.h"
#include "lora_apply_tiles.h"
#include "lora_pack.h"
#include "sgld/isa.h"
#include "torch_view.h"

namespace sgld {
namespace {

constexpr const char* op = "lora_apply_";

LoraApplyRun run_for(Isa isa) {
#if defined(SGLD_X86)
  if (isa >= Isa::avx512) return lora_apply_avx512();
  if (isa == Isa::avx2) return lora_apply_avx2();
#endif
  (void)isa;
  return lora_apply_scalar();
}

// An adapter's part that some row has.
struct Part {
  View down, up;
  int64_t start;
  float scale;
};

// The parts of one adapter and its rows.
struct Set {
  std::vector<Part> parts;
  std::vector<int64_t> rows;
};

struct Task {
  size_t set;
  const int64_t* rows;
  int64_t count;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Lines = std::unique_ptr<T[], Free>;  // of the cache: it starts at one

template <class T>
Lines<T> lines(int64_t count) {
  const int64_t bytes = std::max<int64_t>(ceil_div(count * sizeof(T), 64), 1) * 64;
  Lines<T> memory(static_cast<T*>(std::aligned_alloc(64, bytes)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

View checked(const char* name, const Tensor& tensor) {
  const View view = view_of(op, name, tensor);
  if (view.ndim != 2 || !tensor.is_contiguous())
    fail(op, name, ' ', shape_of(view), " must be contiguous with two dimensions");
  return view;
}

// Into `memory`: the transposed matrix as the right side of a product.
LoraFactor packed(const View& view, std::vector<std::unique_ptr<float[]>>& memory) {
  LoraFactor f;
  f.block_end = 1;
  f.rank = ceil_div(view.sizes[1], 2) * 2;
  const int64_t groups = ceil_div(view.sizes[0], kLoraGroup);
  memory.emplace_back(new float[groups * kLoraGroup * f.rank]);
  float* out = memory.back().get();
  torch::stable::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
    pack_transposed(view, f.rank, begin, end, out);
  });
  f.down = out;
  return f;
}

// The rows of each set; without an index they all have the only one.
void find_rows(const std::optional<Tensor>& index, int64_t rows, std::vector<Set>& sets) {
  if (!index) {
    for (int64_t row = 0; row < rows; ++row) sets[0].rows.push_back(row);
    return;
  }
  if (index->scalar_type() != ScalarType::Long || !index->is_contiguous() || index->numel() != rows)
    fail(op, "index must be contiguous int64 with one number per row of x");
  const auto* numbers = static_cast<const int64_t*>(index->const_data_ptr());
  const auto count = static_cast<int64_t>(sets.size());
  for (int64_t row = 0; row < rows; ++row) {
    if (numbers[row] < -1 || numbers[row] >= count)
      fail(op, "index ", numbers[row], " is none of the ", count, " adapters");
    if (numbers[row] >= 0) sets[numbers[row]].rows.push_back(row);
  }
}

std::vector<Task> tasks_of(const std::vector<Set>& sets, int64_t most_rows) {
  std::vector<Task> tasks;
  for (size_t set = 0; set < sets.size(); ++set) {
    const auto count = static_cast<int64_t>(sets[set].rows.size());
    for (int64_t begin = 0; !sets[set].parts.empty() && begin < count; begin += most_rows)
      tasks.push_back({set, sets[set].rows.data() + begin, std::min(most_rows, count - begin)});
  }
  return tasks;
}

void with_vectors(const std::vector<Set>& sets, LoraApplyRows all) {
  std::vector<std::unique_ptr<float[]>> memory;
  std::vector<std::vector<LoraApplyFactor>> factors(sets.size());
  for (size_t set = 0; set < sets.size(); ++set)
    for (const Part& part : sets[set].parts) {
      factors[set].push_back({packed(part.down, memory), packed(part.up, memory),
                              part.down.sizes[0], part.up.sizes[0], part.start, part.scale});
      all.most_ranks = std::max(all.most_ranks, factors[set].back().up.rank);
    }
  const LoraApplyRun run = run_for(active_isa());
  const std::vector<Task> tasks = tasks_of(sets, kLoraRows);
  const auto count = static_cast<int64_t>(tasks.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[lora_apply_scratch(all)]);
    for (int64_t i = begin; i < end; ++i) {
      const std::vector<LoraApplyFactor>& own = factors[tasks[i].set];
      LoraApplyRows part = all;
      part.factors = own.data();
      part.factor_count = static_cast<int64_t>(own.size());
      part.rows = tasks[i].rows;
      part.count = tasks[i].count;
      run(part, scratch.get());
    }
  });
}

#if defined(SGLD_X86)

bool suits_tiles(const std::vector<Set>& sets, const LoraApplyRows& all) {
  if (!active_amx() || all.x_dtype != DType::bf16 || all.y_dtype != DType::bf16) return false;
  for (const Set& set : sets)
    for (const Part& part : set.parts)
      if (part.down.dtype != DType::bf16 || part.up.dtype != DType::bf16) return false;
  return true;
}

LoraTileSource source(const View& view) {
  return {static_cast<const bf16*>(view.data), view.sizes[0], view.sizes[1]};
}

void with_tiles(const std::vector<Set>& sets, const LoraApplyRows& all) {
  struct Packing {
    const Part* part;
    LoraTileFactor* factor;
    int64_t down, up;  // words into the memory
  };
  std::vector<std::vector<LoraTileFactor>> factors(sets.size());
  std::vector<Packing> packings;
  int64_t words = 0;
  for (size_t set = 0; set < sets.size(); ++set) {
    factors[set].resize(sets[set].parts.size());
    for (size_t i = 0; i < factors[set].size(); ++i) {
      const Part& part = sets[set].parts[i];
      LoraTileFactor& f = factors[set][i];
      f.rank_tiles = ceil_div(part.down.sizes[0], kApplyRanks);
      f.panel_begin = part.start / kApplyPanel;
      f.panel_end = ceil_div(part.start + part.up.sizes[0], kApplyPanel);
      f.scale = part.scale;
      const int64_t down = words, up = down + lora_down_words(part.down.sizes[0], all.width);
      words = up + lora_up_words(f);
      packings.push_back({&part, &f, down, up});
    }
  }
  const Lines<uint32_t> memory = lines<uint32_t>(words);
  const auto halves = 2 * static_cast<int64_t>(packings.size());
  torch::stable::parallel_for(0, halves, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Packing& p = packings[i / 2];
      if (i % 2) {
        lora_pack_up_tiles(source(p.part->up), *p.factor, p.part->start, memory.get() + p.up);
        p.factor->up = memory.get() + p.up;
      } else {
        lora_pack_down_tiles(source(p.part->down), memory.get() + p.down);
        p.factor->down = memory.get() + p.down;
      }
    }
  });
  const std::vector<Task> tasks = tasks_of(sets, kApplyRows);
  const auto count = static_cast<int64_t>(tasks.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Lines<bf16> scratch;
    int64_t room = 0;
    for (int64_t i = begin; i < end; ++i) {
      const std::vector<LoraTileFactor>& own = factors[tasks[i].set];
      const LoraTileRows part{own.data(),
                              static_cast<int64_t>(own.size()),
                              tasks[i].rows,
                              tasks[i].count,
                              static_cast<const bf16*>(all.x),
                              static_cast<bf16*>(all.y),
                              all.width,
                              all.out};
      if (lora_tile_scratch(part) > room) scratch = lines<bf16>(room = lora_tile_scratch(part));
      lora_apply_tiles(part, scratch.get());
    }
  });
}

#endif

}  // namespace

void lora_apply_cpu(const Tensor& x, Tensor y, const std::optional<Tensor>& index,
                    const Tensors& downs, const Tensors& ups, const std::vector<double>& scales,
                    const std::vector<int64_t>& starts, const std::vector<int64_t>& counts) {
  const View xs = checked("x", x), ys = checked("y", y);
  LoraApplyRows all;
  const int64_t rows = xs.sizes[0];
  all.width = xs.sizes[1];
  all.out = ys.sizes[1];
  all.x = xs.data;
  all.y = y.mutable_data_ptr();
  all.x_dtype = xs.dtype;
  all.y_dtype = ys.dtype;
  check_size(op, "y", ys, 0, {"rows of x", rows});
  if (ups.size() != downs.size() || scales.size() != downs.size() || starts.size() != downs.size())
    fail(op, "the lists differ in length");
  int64_t listed = 0;
  for (const int64_t count : counts) {
    if (count < 0) fail(op, "counts must not be negative");
    listed += count;
  }
  if (listed != static_cast<int64_t>(downs.size())) fail(op, "counts do not fit the factors");

  const std::vector<int64_t> sizes = index ? counts : std::vector<int64_t>{listed};
  std::vector<Set> sets(sizes.size());
  find_rows(index, rows, sets);
  for (size_t set = 0, i = 0; set < sets.size(); ++set)
    for (int64_t n = 0; n < sizes[set]; ++n, ++i) {
      const View down = checked("down", downs[i]), up = checked("up", ups[i]);
      check_size(op, "down", down, 1, {"columns of x", all.width});
      check_size(op, "up", up, 1, {"rank of down", down.sizes[0]});
      if (starts[i] < 0 || starts[i] + up.sizes[0] > all.out)
        fail(op, "rows ", starts[i], " to ", starts[i] + up.sizes[0], " of up ", shape_of(up),
             " are not within the ", all.out, " columns of y");
      if (!sets[set].rows.empty() && down.sizes[0] > 0 && up.sizes[0] > 0)
        sets[set].parts.push_back({down, up, starts[i], static_cast<float>(scales[i])});
    }
#if defined(SGLD_X86)
  if (suits_tiles(sets, all)) return with_tiles(sets, all);
#endif
  with_vectors(sets, all);
}

}  // namespace sgld
