// lora_apply on the CPU: rows sorted by adapter, then blocks of rows over the threads.
#include "lora_apply.h"

#include <algorithm>
#include <memory>

#include "lora.h"
#include "lora_pack.h"
#include "sgld/isa.h"
#include "torch_view.h"

namespace sgld {
namespace {

constexpr const char* op = "lora_apply";

LoraApplyRun run_for(Isa isa) {
#if defined(SGLD_X86)
  if (isa >= Isa::avx512) return lora_apply_avx512();
  if (isa == Isa::avx2) return lora_apply_avx2();
#endif
  (void)isa;
  return lora_apply_scalar();
}

struct Task {
  const LoraApplyFactor* factors;
  int64_t factor_count;
  const int64_t* rows;
  int64_t count;
};

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

std::vector<std::vector<int64_t>> rows_of_sets(const std::optional<Tensor>& index, int64_t rows,
                                               int64_t sets) {
  std::vector<std::vector<int64_t>> found(sets);
  if (!index) {
    for (int64_t row = 0; row < rows; ++row) found[0].push_back(row);
    return found;
  }
  if (index->scalar_type() != ScalarType::Long || !index->is_contiguous() || index->numel() != rows)
    fail(op, "index must be contiguous int64 with one number per row of x");
  const auto* numbers = static_cast<const int64_t*>(index->const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    if (numbers[row] < -1 || numbers[row] >= sets)
      fail(op, "index ", numbers[row], " is none of the ", sets, " adapters");
    if (numbers[row] >= 0) found[numbers[row]].push_back(row);
  }
  return found;
}

}  // namespace

Tensor lora_apply_cpu(const Tensor& x, const Tensor& y, const std::optional<Tensor>& index,
                      const Tensors& downs, const Tensors& ups, const std::vector<double>& scales,
                      const std::vector<int64_t>& starts, const std::vector<int64_t>& counts) {
  const View xs = checked("x", x), ys = checked("y", y);
  LoraApplyRows all;
  const int64_t rows = xs.sizes[0];
  all.width = xs.sizes[1];
  all.out = ys.sizes[1];
  all.x = xs.data;
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

  // The factors of each adapter and its rows; without an index, one set of all factors and rows.
  const std::vector<int64_t> sets = index ? counts : std::vector<int64_t>{listed};
  const auto rows_of = rows_of_sets(index, rows, static_cast<int64_t>(sets.size()));
  std::vector<std::unique_ptr<float[]>> memory;
  std::vector<LoraApplyFactor> factors;
  for (size_t set = 0, i = 0; set < sets.size(); ++set)
    for (int64_t n = 0; n < sets[set]; ++n, ++i) {
      const View down = checked("down", downs[i]), up = checked("up", ups[i]);
      check_size(op, "down", down, 1, {"columns of x", all.width});
      check_size(op, "up", up, 1, {"rank of down", down.sizes[0]});
      if (starts[i] < 0 || starts[i] + up.sizes[0] > all.out)
        fail(op, "rows ", starts[i], " to ", starts[i] + up.sizes[0], " of up ", shape_of(up),
             " are not within the ", all.out, " columns of y");
      factors.emplace_back();
      if (rows_of[set].empty()) continue;
      factors.back() = {packed(down, memory), packed(up, memory), down.sizes[0],
                        up.sizes[0],          starts[i],          static_cast<float>(scales[i])};
      all.most_ranks = std::max(all.most_ranks, factors.back().up.rank);
    }

  Tensor out = torch::stable::clone(y);
  all.y = out.mutable_data_ptr();
  std::vector<Task> tasks;
  const LoraApplyFactor* next = factors.data();
  for (size_t set = 0; set < sets.size(); next += sets[set++]) {
    const auto row_count = static_cast<int64_t>(rows_of[set].size());
    for (int64_t begin = 0; sets[set] > 0 && begin < row_count; begin += kLoraRows)
      tasks.push_back(
          {next, sets[set], rows_of[set].data() + begin, std::min(kLoraRows, row_count - begin)});
  }

  const LoraApplyRun run = run_for(active_isa());
  const auto count = static_cast<int64_t>(tasks.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[lora_apply_scratch(all)]);
    for (int64_t i = begin; i < end; ++i) {
      LoraApplyRows part = all;
      part.factors = tasks[i].factors;
      part.factor_count = tasks[i].factor_count;
      part.rows = tasks[i].rows;
      part.count = tasks[i].count;
      run(part, scratch.get());
    }
  });
  return out;
}

}  // namespace sgld
