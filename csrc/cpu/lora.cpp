// Merge and unmerge of many matrices on the CPU: checks, packing, then blocks of rows over the threads.
#include "lora.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "lora_pack.h"
#include "lora_units.h"
#include "torch_view.h"

namespace sgld {
namespace {

constexpr int64_t kSampledPanels = 8;
constexpr int64_t kNumbersOfPart = int64_t{1} << 15;  // of factors that are one task
// Of weights and factors: more would push packed factors out of L2 before their matrix has its turn.
constexpr int64_t kNumbersOfBatch = int64_t{1} << 23;
constexpr int64_t kPanelsOfTask = 32;  // at least, for a thread of its own

struct Free {
  void operator()(char* p) const { std::free(p); }
};

struct Matrix {
  char* weight = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0, stride = 0;
  std::vector<LoraAdapter> adapters;

  int64_t item() const { return size_of(dtype); }
  int64_t blocks() const { return ceil_div(rows, kLoraRows); }
  int64_t groups() const { return ceil_div(cols, kLoraGroup); }
  char* row(int64_t i) const { return weight + i * stride * item(); }
};

void check_dense(const char* op, const char* name, const View& view) {
  if (view.ndim != 2) fail(op, name, ' ', shape_of(view), " must have two dimensions");
  if (view.sizes[1] > 1 && view.strides[1] != 1)
    fail(op, name, " must be dense in its last dimension");
}

LoraAdapter bind_adapter(const char* op, const Matrix& m, const View& down, const View& up,
                         double scale, int64_t start) {
  check_dense(op, "down", down);
  check_dense(op, "up", up);
  check_size(op, "down", down, 1, {"columns of the weight", m.cols});
  check_size(op, "up", up, 1, {"rank of down", down.sizes[0]});
  if (start < 0 || start + up.sizes[0] > m.rows)
    fail(op, "rows ", start, " to ", start + up.sizes[0], " of up ", shape_of(up),
         " are not within the weight's ", m.rows);
  return {down.data,     up.data,       down.dtype, up.dtype,    down.strides[0],
          up.strides[0], down.sizes[0], start,      up.sizes[0], static_cast<float>(scale)};
}

// The weights with their adapters. A factor that is not dense is copied into `kept`.
std::vector<Matrix> bind(const char* op, const Tensors& weights, const Tensors& downs,
                         const Tensors& ups, const std::vector<double>& scales,
                         const std::vector<int64_t>& starts, const std::vector<int64_t>& counts,
                         Tensors& kept) {
  if (counts.size() != weights.size() || ups.size() != downs.size() ||
      scales.size() != downs.size() || starts.size() != downs.size())
    fail(op, "the lists differ in length");
  std::vector<Matrix> matrices;
  size_t next = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const View view = view_of(op, "weight", weights[i]);
    check_dense(op, "weight", view);
    Matrix m;
    m.weight = static_cast<char*>(weights[i].mutable_data_ptr());
    m.dtype = view.dtype;
    m.rows = view.sizes[0];
    m.cols = view.sizes[1];
    m.stride = view.strides[0];
    if (m.rows > 1 && m.stride < m.cols) fail(op, "the rows of a weight overlap");
    for (int64_t n = 0; n < counts[i]; ++n, ++next) {
      if (next >= downs.size()) fail(op, "there are fewer adapters than counts say");
      const Tensor down = dense_last(downs[next]), up = dense_last(ups[next]);
      kept.push_back(down);
      kept.push_back(up);
      m.adapters.push_back(bind_adapter(op, m, view_of(op, "down", down), view_of(op, "up", up),
                                        scales[next], starts[next]));
    }
    matrices.push_back(std::move(m));
  }
  if (next != downs.size()) fail(op, "there are more adapters than counts say");
  return matrices;
}

// Rows of something, about as many numbers as there are in other parts, so that no thread waits long for another.
struct Part {
  int64_t index = 0, begin = 0, end = 0;
};

// Parts of `index`, which has `rows` rows of `width` numbers.
void cut(std::vector<Part>& parts, int64_t index, int64_t rows, int64_t width) {
  const int64_t step = std::max<int64_t>(kNumbersOfPart / std::max<int64_t>(width, 1), 1);
  for (int64_t row = 0; row < rows; row += step)
    parts.push_back({index, row, std::min(row + step, rows)});
}

template <class F>
void over_parts(const std::vector<Part>& parts, F f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) f(parts[i]);
                              });
}

// Before the first weight changes: an update that is not finite could not be told from a wrong one.
void check_finite(const char* op, const std::vector<Matrix>& matrices) {
  struct Rows {
    const char* data;
    DType dtype;
    int64_t stride, width, matrix;
  };
  std::vector<Rows> all;
  std::vector<Part> parts;
  std::atomic<int64_t> bad{-1};
  const auto add = [&](const void* data, DType dtype, int64_t stride, int64_t rows, int64_t width,
                       int64_t matrix) {
    cut(parts, static_cast<int64_t>(all.size()), rows, width);
    all.push_back({static_cast<const char*>(data), dtype, stride, width, matrix});
  };
  for (size_t i = 0; i < matrices.size(); ++i)
    for (const LoraAdapter& a : matrices[i].adapters) {
      const auto matrix = static_cast<int64_t>(i);
      if (!std::isfinite(a.scale)) bad = matrix;
      add(a.down, a.down_dtype, a.down_stride, a.rank, matrices[i].cols, matrix);
      add(a.up, a.up_dtype, a.up_stride, a.rows, a.rank, matrix);
    }
  over_parts(parts, [&](const Part& p) {
    const Rows& r = all[p.index];
    const char* first = r.data + p.begin * r.stride * size_of(r.dtype);
    if (!rows_finite(first, r.dtype, r.stride, p.end - p.begin, r.width)) bad = r.matrix;
  });
  if (bad >= 0) fail(op, "an adapter of weight ", bad.load(), " is not finite");
}

// Some matrices one after another that are worked on together: threads meet after each kind of work, and a matrix
// alone is too little between two meetings.
struct Batch {
  const Matrix* matrices = nullptr;
  int64_t count = 0;
  std::vector<int> bits;                         // of a code; 0: a copy
  std::vector<std::vector<LoraFactor>> factors;  // of each matrix, packed
  std::vector<int64_t> first_panel;              // of each matrix, and behind the last one
};

int64_t panels_of(const Matrix& m) { return ceil_div(m.cols, kLoraPanel); }

// The next batch from matrix `from` on: as much as it may be, but one matrix at least.
Batch next_batch(const std::vector<Matrix>& matrices, size_t from) {
  Batch batch;
  batch.matrices = matrices.data() + from;
  batch.first_panel.push_back(0);
  int64_t numbers = 0;
  for (size_t i = from; i < matrices.size(); ++i) {
    const Matrix& m = matrices[i];
    numbers += m.rows * m.cols;
    for (const LoraAdapter& a : m.adapters) numbers += a.rank * (m.cols + a.rows);
    if (batch.count > 0 && numbers > kNumbersOfBatch) break;
    batch.first_panel.push_back(batch.first_panel.back() + m.blocks() * panels_of(m));
    ++batch.count;
  }
  batch.bits.resize(batch.count);
  batch.factors.resize(batch.count);
  return batch;
}

// f(matrix, first block, last block) of runs of blocks. Each thread has about as many panels as the others, in the
// order in which they lie in memory.
template <class F>
void over_blocks(const Batch& batch, F f) {
  torch::stable::parallel_for(
      0, batch.first_panel.back(), kPanelsOfTask, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < batch.count; ++i) {
          const int64_t first = batch.first_panel[i], last = batch.first_panel[i + 1];
          if (first == last || last <= begin || end <= first) continue;
          // A block is done where its first panel is.
          const int64_t panels = panels_of(batch.matrices[i]);
          const int64_t from = ceil_div(std::max<int64_t>(begin - first, 0), panels);
          const int64_t to = ceil_div(std::min(end, last) - first, panels);
          if (from < to) f(i, from, to);
        }
      });
}

// Packs the factors of one batch after another, into memory that is used again.
class Packer {
 public:
  // Matrices that are kept as copies are left out unless `all` are asked for.
  void pack(Batch& batch, const LoraKernels& kernels, bool all) {
    std::vector<Target> targets;
    std::vector<Part> parts;
    int64_t bytes = 0;
    const auto add = [&](Target target, int64_t size, int64_t rows, int64_t width) {
      cut(parts, static_cast<int64_t>(targets.size()), rows, width);
      target.offset = bytes;
      targets.push_back(target);
      bytes += ceil_div(size, 64) * 64;
    };
    for (int64_t i = 0; i < batch.count; ++i) {
      const Matrix& m = batch.matrices[i];
      if (!all && batch.bits[i] == 0) continue;
      for (size_t n = 0; n < m.adapters.size(); ++n) {
        const LoraFactor f = plan_factor(m.adapters[n], kernels, m.rows);
        add({i, n, false}, down_bytes(f, m.cols), m.groups(), f.rank * kLoraGroup);
        if (!f.up)
          add({i, n, true}, up_bytes(f), (f.block_end - f.block_begin) * kLoraRows, f.rank);
        batch.factors[i].push_back(f);
      }
    }
    reserve(bytes);
    for (const Target& t : targets) {
      LoraFactor& f = batch.factors[t.matrix][t.adapter];
      (t.up ? f.up : f.down) = memory_.get() + t.offset;
    }
    over_parts(parts, [&](const Part& p) {
      const Target& t = targets[p.index];
      const Matrix& m = batch.matrices[t.matrix];
      const LoraAdapter& a = m.adapters[t.adapter];
      const LoraFactor& f = batch.factors[t.matrix][t.adapter];
      char* to = memory_.get() + t.offset;
      if (t.up) return pack_up(a, f, p.begin, p.end, to);
      const bool split = kernels.split_bf16 && m.dtype == DType::bf16;
      pack_down(a, f, m.cols, split, p.begin, p.end, to);
    });
  }

 private:
  // Where a factor of the batch is packed to.
  struct Target {
    int64_t matrix;
    size_t adapter;
    bool up;
    int64_t offset = 0;
  };

  void reserve(int64_t bytes) {
    if (bytes <= size_) return;
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
    size_ = bytes;
  }

  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

LoraBlock block_of(const Matrix& m, const std::vector<LoraFactor>& factors, int64_t index) {
  LoraBlock b;
  b.factors = factors.data();
  b.factor_count = static_cast<int64_t>(factors.size());
  b.dtype = m.dtype;
  b.index = index;
  b.rows = std::min(kLoraRows, m.rows - index * kLoraRows);
  b.cols = b.column_end = m.cols;
  b.weight = m.row(index * kLoraRows);
  b.stride = m.stride;
  return b;
}

// The number of bits that suits each matrix, from panels that are merged as a trial, on copies.
void plan_bits(Batch& batch, const LoraKernels& kernels) {
  struct Trial {
    int64_t matrix, panel;
    LoraSample found;
  };
  std::vector<Trial> trials;
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t all = batch.first_panel[i + 1] - batch.first_panel[i];
    const int64_t count = std::min(kSampledPanels, all);
    for (int64_t n = 0; n < count; ++n) trials.push_back({i, n * all / count, {}});
  }
  const auto count = static_cast<int64_t>(trials.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kCells = kLoraRows * kLoraPanel;
    const std::unique_ptr<char[]> weights(new char[kCells * 4]);
    const std::unique_ptr<char[]> escapes(new char[(kCells + kLoraGroup) * 4]);
    const std::unique_ptr<uint32_t[]> words(new uint32_t[kCells / kLoraGroup * kLoraMaxBits]);
    for (int64_t i = begin; i < end; ++i) {
      Trial& t = trials[i];
      const Matrix& m = batch.matrices[t.matrix];
      const int64_t panels = panels_of(m);
      LoraBlock b = block_of(m, batch.factors[t.matrix], t.panel / panels);
      b.column_begin = t.panel % panels * kLoraPanel;
      b.column_end = std::min(b.column_begin + kLoraPanel, m.cols);
      const int64_t width = b.column_end - b.column_begin, groups = ceil_div(width, kLoraGroup);
      for (int64_t row = 0; row < b.rows; ++row)
        std::memcpy(weights.get() + row * width * m.item(),
                    m.row(b.index * kLoraRows + row) + b.column_begin * m.item(), width * m.item());
      b.weight = weights.get();
      b.stride = width;
      b.bits = kLoraMaxBits;
      b.codes = words.get();
      b.code_stride = groups * b.bits;
      b.escapes = escapes.get();
      kernels.merge(b);
      count_codes(words.get(), b.rows * groups, t.found);
    }
  });
  std::vector<LoraSample> totals(batch.count);
  for (const Trial& t : trials) {
    LoraSample& total = totals[t.matrix];
    total.weights += t.found.weights;
    for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits)
      total.escapes[bits] += t.found.escapes[bits];
  }
  for (int64_t i = 0; i < batch.count; ++i)
    batch.bits[i] = totals[i].weights ? choose_bits(totals[i], batch.matrices[i].dtype) : 0;
}

// The escapes of a run of blocks, as they come.
class Found {
 public:
  // Where the next may be written, and as many bytes there.
  char* room(int64_t bytes) {
    if (size_ + bytes > capacity_) {
      capacity_ = std::max(size_ + bytes, 2 * capacity_);
      void* more = std::realloc(memory_.get(), capacity_);
      if (!more) throw std::bad_alloc();
      static_cast<void>(memory_.release());
      memory_.reset(static_cast<char*>(more));
    }
    return memory_.get() + size_;
  }
  void keep(int64_t bytes) { size_ += bytes; }
  const char* data() const { return memory_.get(); }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0, capacity_ = 0;
};

void merge_batch(const Batch& batch, const Tensor* weights, const LoraKernels& kernels,
                 LoraRecords& records) {
  struct Run {
    int64_t matrix, first;  // of its blocks
    Found escapes;
  };
  struct Kept {
    uint32_t* codes;
    int64_t* ends;
    char* escapes;
    std::atomic<uint32_t> checksum{0};
  };
  auto& [codes, escapes, ends, checksums] = records;
  const size_t before = codes.size();
  std::vector<Kept> kept(batch.count);
  for (int64_t i = 0; i < batch.count; ++i) {
    const Matrix& m = batch.matrices[i];
    const Tensor& weight = weights[i];
    codes.push_back(
        torch::stable::new_empty(weight, {m.rows, m.groups() * batch.bits[i]}, ScalarType::Int));
    ends.push_back(torch::stable::new_empty(weight, {m.blocks() + 1}, ScalarType::Long));
    escapes.push_back(torch::stable::new_empty(weight, {batch.bits[i] ? 0 : m.rows * m.cols}));
    kept[i].codes = static_cast<uint32_t*>(codes.back().mutable_data_ptr());
    kept[i].ends = static_cast<int64_t*>(ends.back().mutable_data_ptr());
    kept[i].escapes = static_cast<char*>(escapes.back().mutable_data_ptr());
    std::fill(kept[i].ends, kept[i].ends + m.blocks() + 1, 0);
  }
  std::vector<Run> runs;
  std::mutex adding;
  over_blocks(batch, [&](int64_t i, int64_t begin, int64_t end) {
    const Matrix& m = batch.matrices[i];
    const int bits = batch.bits[i];
    const int64_t words = m.groups() * bits, row_bytes = m.cols * m.item();
    const int64_t room = bits ? kLoraRows * row_bytes + kLoraGroup * m.item() : 0;
    Run run{i, begin, {}};
    uint32_t checksum = 0;
    for (int64_t index = begin; index < end; ++index) {
      LoraBlock b = block_of(m, batch.factors[i], index);
      const int64_t first = index * kLoraRows;
      if (bits == 0)
        for (int64_t row = first; row < first + b.rows; ++row)
          std::memcpy(kept[i].escapes + row * row_bytes, m.row(row), row_bytes);
      b.bits = bits;
      b.codes = kept[i].codes + first * words;
      b.code_stride = words;
      b.escapes = run.escapes.room(room);
      const LoraPassed passed = kernels.merge(b);
      run.escapes.keep(bits ? passed.escapes * m.item() : 0);
      kept[i].ends[index + 1] = bits ? passed.escapes : b.rows * m.cols;
      checksum += passed.checksum;
    }
    kept[i].checksum += checksum;
    if (bits == 0) return;
    const std::lock_guard<std::mutex> lock(adding);
    runs.push_back(std::move(run));
  });
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t blocks = batch.matrices[i].blocks();
    int64_t* end_of = kept[i].ends;
    for (int64_t n = 0; n < blocks; ++n) end_of[n + 1] += end_of[n];
    checksums.push_back(batch.bits[i] ? int64_t{kept[i].checksum.load()} : 0);
    if (batch.bits[i] == 0) continue;
    Tensor& own = escapes[before + i];
    own = torch::stable::new_empty(weights[i], {end_of[blocks]});
    kept[i].escapes = static_cast<char*>(own.mutable_data_ptr());
  }
  torch::stable::parallel_for(
      0, static_cast<int64_t>(runs.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const Run& run = runs[n];
          const Kept& k = kept[run.matrix];
          std::memcpy(k.escapes + k.ends[run.first] * batch.matrices[run.matrix].item(),
                      run.escapes.data(), run.escapes.size());
        }
      });
}

// The bits of a record's codes; throws where it cannot be one of this matrix.
int check_record(const Matrix& m, const Tensor& weight, const Tensor& codes, const Tensor& escapes,
                 const Tensor& ends) {
  constexpr const char* op = kLoraUnmerge;
  const bool dense = codes.is_contiguous() && escapes.is_contiguous() && ends.is_contiguous();
  if (!dense || codes.dim() != 2 || escapes.dim() != 1 || ends.dim() != 1 ||
      codes.scalar_type() != ScalarType::Int || ends.scalar_type() != ScalarType::Long ||
      escapes.scalar_type() != weight.scalar_type() || codes.size(0) != m.rows ||
      ends.size(0) != m.blocks() + 1)
    fail(op, "a record is not one of a weight [", m.rows, ", ", m.cols, "] of this dtype");
  const int64_t bits = m.groups() == 0 ? 0 : codes.size(1) / m.groups();
  const bool known = bits == 0 || (bits >= kLoraMinBits && bits <= kLoraMaxBits);
  const auto* end_of = static_cast<const int64_t*>(ends.const_data_ptr());
  bool rising = end_of[0] == 0 && end_of[m.blocks()] == escapes.size(0);
  for (int64_t i = 0; i < m.blocks(); ++i) rising = rising && end_of[i] <= end_of[i + 1];
  if (!known || codes.size(1) != bits * m.groups() || !rising ||
      (bits == 0 && escapes.size(0) != m.rows * m.cols))
    fail(op, "a record is not one of a weight [", m.rows, ", ", m.cols, "]");
  return static_cast<int>(bits);
}

void copy_rows(const Matrix& m, int64_t first, int64_t count, const char* from) {
  const int64_t row_bytes = m.cols * m.item();
  for (int64_t row = 0; row < count; ++row)
    std::memcpy(m.row(first + row), from + row * row_bytes, row_bytes);
}

// What a record keeps of a matrix.
struct Recorded {
  const uint32_t* codes;
  const char* escapes;
  const int64_t* ends;
};

// The checksums of what was restored; 0 for a copy.
void unmerge_batch(const Batch& batch, const Recorded* records, const LoraKernels& kernels,
                   std::vector<int64_t>& checksums) {
  std::vector<std::atomic<uint32_t>> sums(batch.count);
  over_blocks(batch, [&](int64_t i, int64_t begin, int64_t end) {
    const Matrix& m = batch.matrices[i];
    const Recorded& r = records[i];
    uint32_t checksum = 0;
    for (int64_t index = begin; index < end; ++index) {
      LoraBlock b = block_of(m, batch.factors[i], index);
      b.bits = batch.bits[i];
      const char* escapes = r.escapes + r.ends[index] * m.item();
      if (b.bits == 0) {
        copy_rows(m, index * kLoraRows, b.rows, escapes);
        continue;
      }
      b.code_stride = m.groups() * b.bits;
      b.codes = const_cast<uint32_t*>(r.codes) + index * kLoraRows * b.code_stride;
      b.escapes = const_cast<char*>(escapes);
      checksum += kernels.unmerge(b).checksum;
    }
    sums[i] += checksum;
  });
  for (const auto& sum : sums) checksums.push_back(sum.load());
}

}  // namespace

std::string lora_cpu_units() { return lora_units().name; }

LoraRecords lora_merge_cpu(const Tensors& weights, const Tensors& downs, const Tensors& ups,
                           const std::vector<double>& scales, const std::vector<int64_t>& starts,
                           const std::vector<int64_t>& counts) {
  Tensors kept;
  const auto matrices = bind(kLoraMerge, weights, downs, ups, scales, starts, counts, kept);
  check_finite(kLoraMerge, matrices);
  const LoraKernels kernels = lora_units().kernels;
  Packer packer;
  LoraRecords records;
  for (size_t from = 0; from < matrices.size();) {
    Batch batch = next_batch(matrices, from);
    packer.pack(batch, kernels, true);
    plan_bits(batch, kernels);
    merge_batch(batch, weights.data() + from, kernels, records);
    from += batch.count;
  }
  return records;
}

std::vector<int64_t> lora_unmerge_cpu(const Tensors& weights, const Tensors& downs,
                                      const Tensors& ups, const std::vector<double>& scales,
                                      const std::vector<int64_t>& starts,
                                      const std::vector<int64_t>& counts, const Tensors& codes,
                                      const Tensors& escapes, const Tensors& ends) {
  Tensors kept;
  const auto matrices = bind(kLoraUnmerge, weights, downs, ups, scales, starts, counts, kept);
  const size_t count = matrices.size();
  if (codes.size() != count || escapes.size() != count || ends.size() != count)
    fail(kLoraUnmerge, "the lists differ in length");
  std::vector<int> bits;
  std::vector<Recorded> records;
  for (size_t i = 0; i < count; ++i) {
    bits.push_back(check_record(matrices[i], weights[i], codes[i], escapes[i], ends[i]));
    records.push_back({static_cast<const uint32_t*>(codes[i].const_data_ptr()),
                       static_cast<const char*>(escapes[i].const_data_ptr()),
                       static_cast<const int64_t*>(ends[i].const_data_ptr())});
  }
  const LoraKernels kernels = lora_units().kernels;
  Packer packer;
  std::vector<int64_t> checksums;
  for (size_t from = 0; from < count;) {
    Batch batch = next_batch(matrices, from);
    std::copy_n(bits.begin() + from, batch.count, batch.bits.begin());
    packer.pack(batch, kernels, false);
    unmerge_batch(batch, records.data() + from, kernels, checksums);
    from += batch.count;
  }
  return checksums;
}

}  // namespace sgld
