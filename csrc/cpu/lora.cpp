// Merge and unmerge of many matrices on the CPU: checks, packing, then blocks of rows over the threads.
#include "lora.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "lora_pack.h"
#include "lora_units.h"
#include "torch_view.h"

namespace sgld {
namespace {

constexpr int64_t kSampledPanels = 8;
constexpr int64_t kCheckedNumbers = int64_t{1} << 15;  // that are looked at as one task

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

// Before the first weight changes: an update that is not finite could not be told from a wrong one.
void check_finite(const char* op, const std::vector<Matrix>& matrices) {
  // Some rows of a factor. Parts are about equal, so that no thread waits long for another.
  struct Part {
    const char* data;
    DType dtype;
    int64_t stride, rows, cols, matrix;
  };
  std::vector<Part> parts;
  std::atomic<int64_t> bad{-1};
  const auto cut = [&parts](const void* data, DType dtype, int64_t stride, int64_t rows,
                            int64_t cols, int64_t matrix) {
    const int64_t step = std::max<int64_t>(kCheckedNumbers / std::max<int64_t>(cols, 1), 1);
    for (int64_t row = 0; row < rows; row += step)
      parts.push_back({static_cast<const char*>(data) + row * stride * size_of(dtype), dtype,
                       stride, std::min(step, rows - row), cols, matrix});
  };
  for (size_t i = 0; i < matrices.size(); ++i)
    for (const LoraAdapter& a : matrices[i].adapters) {
      const auto matrix = static_cast<int64_t>(i);
      if (!std::isfinite(a.scale)) bad = matrix;
      cut(a.down, a.down_dtype, a.down_stride, a.rank, matrices[i].cols, matrix);
      cut(a.up, a.up_dtype, a.up_stride, a.rows, a.rank, matrix);
    }
  const auto count = static_cast<int64_t>(parts.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& p = parts[i];
      if (!rows_finite(p.data, p.dtype, p.stride, p.rows, p.cols)) bad = p.matrix;
    }
  });
  if (bad >= 0) fail(op, "an adapter of weight ", bad.load(), " is not finite");
}

// Packed factors of one matrix after another, in memory that is used again.
class Packer {
 public:
  const std::vector<LoraFactor>& pack(const Matrix& m, const LoraKernels& kernels) {
    const bool split = kernels.split_bf16 && m.dtype == DType::bf16;
    factors_.clear();
    int64_t bytes = 0;
    const auto take = [&bytes](int64_t n) {
      const int64_t offset = bytes;
      bytes += ceil_div(n, 64) * 64;
      return offset;
    };
    std::vector<std::pair<int64_t, int64_t>> offsets;
    for (const LoraAdapter& a : m.adapters) {
      factors_.push_back(plan_factor(a, kernels, m.rows));
      const int64_t down = take(down_bytes(factors_.back(), m.cols));
      offsets.emplace_back(down, take(up_bytes(factors_.back())));
    }
    reserve(bytes);
    for (size_t i = 0; i < factors_.size(); ++i) {
      const LoraAdapter& a = m.adapters[i];
      LoraFactor& f = factors_[i];
      char *down = memory_.get() + offsets[i].first, *up = memory_.get() + offsets[i].second;
      f.down = down;
      torch::stable::parallel_for(0, m.groups(), 16, [&](int64_t begin, int64_t end) {
        pack_down(a, f, m.cols, split, begin, end, down);
      });
      if (f.up) continue;
      f.up = up;
      const int64_t rows = (f.block_end - f.block_begin) * kLoraRows;
      torch::stable::parallel_for(
          0, rows, 512, [&](int64_t begin, int64_t end) { pack_up(a, f, begin, end, up); });
    }
    return factors_;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  void reserve(int64_t bytes) {
    if (bytes <= size_) return;
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
    size_ = bytes;
  }

  std::vector<LoraFactor> factors_;
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

// The number of bits that suits this matrix, from panels that are merged as a trial, on copies.
int plan_bits(const Matrix& m, const std::vector<LoraFactor>& factors, const LoraKernels& kernels) {
  const int64_t panels = ceil_div(m.cols, kLoraPanel), all = m.blocks() * panels;
  const int64_t count = std::min(kSampledPanels, all);
  std::vector<LoraSample> samples(count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kCells = kLoraRows * kLoraPanel;
    const std::unique_ptr<char[]> weights(new char[kCells * 4]);
    const std::unique_ptr<char[]> escapes(new char[(kCells + kLoraGroup) * 4]);
    const std::unique_ptr<uint32_t[]> words(new uint32_t[kCells / kLoraGroup * kLoraMaxBits]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * all / count;
      LoraBlock b = block_of(m, factors, at / panels);
      b.column_begin = at % panels * kLoraPanel;
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
      count_codes(words.get(), b.rows * groups, samples[i]);
    }
  });
  LoraSample total;
  for (const LoraSample& sample : samples) {
    total.weights += sample.weights;
    for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits)
      total.escapes[bits] += sample.escapes[bits];
  }
  return choose_bits(total, m.dtype);
}

struct Merged {
  Tensor codes, escapes, ends;
  int64_t checksum;
};

Merged merge_one(const Tensor& weight, const Matrix& m, const std::vector<LoraFactor>& factors,
                 const LoraKernels& kernels) {
  const int64_t blocks = m.blocks();
  const int bits = m.rows * m.cols == 0 ? 0 : plan_bits(m, factors, kernels);
  const int64_t words = m.groups() * bits;
  Tensor codes = torch::stable::new_empty(weight, {m.rows, words}, ScalarType::Int);
  Tensor ends = torch::stable::new_empty(weight, {blocks + 1}, ScalarType::Long);
  auto* code = static_cast<uint32_t*>(codes.mutable_data_ptr());
  auto* end_of = static_cast<int64_t*>(ends.mutable_data_ptr());
  Tensor copy = torch::stable::new_empty(weight, {bits ? 0 : m.rows * m.cols});
  auto* copied = static_cast<char*>(copy.mutable_data_ptr());
  std::vector<std::vector<char>> escapes(blocks);
  std::atomic<uint32_t> checksum{0};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t room = bits ? (kLoraRows * m.cols + kLoraGroup) * m.item() : 0;
    const std::unique_ptr<char[]> found(new char[room]);
    for (int64_t index = begin; index < end; ++index) {
      LoraBlock b = block_of(m, factors, index);
      const int64_t first = index * kLoraRows, row_bytes = m.cols * m.item();
      if (bits == 0)
        for (int64_t row = first; row < first + b.rows; ++row)
          std::memcpy(copied + row * row_bytes, m.row(row), row_bytes);
      b.bits = bits;
      b.codes = code + first * words;
      b.code_stride = words;
      b.escapes = found.get();
      const LoraPassed passed = kernels.merge(b);
      const int64_t count = bits ? passed.escapes : b.rows * m.cols;
      if (bits) escapes[index].assign(found.get(), found.get() + count * m.item());
      end_of[index + 1] = count;
      checksum += passed.checksum;
    }
  });
  end_of[0] = 0;
  for (int64_t i = 0; i < blocks; ++i) end_of[i + 1] += end_of[i];
  if (bits) {
    copy = torch::stable::new_empty(weight, {end_of[blocks]});
    copied = static_cast<char*>(copy.mutable_data_ptr());
    torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memcpy(copied + end_of[i] * m.item(), escapes[i].data(), escapes[i].size());
    });
  }
  return {codes, copy, ends, bits ? int64_t{checksum.load()} : 0};
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

// The checksum of what was restored; 0 for a copy.
uint32_t unmerge_one(const Matrix& m, const std::vector<LoraFactor>& factors,
                     const LoraKernels& kernels, int bits, const Tensor& codes,
                     const Tensor& escapes, const Tensor& ends) {
  const auto* code = static_cast<const uint32_t*>(codes.const_data_ptr());
  const auto* escape = static_cast<const char*>(escapes.const_data_ptr());
  const auto* end_of = static_cast<const int64_t*>(ends.const_data_ptr());
  std::atomic<uint32_t> checksum{0};
  torch::stable::parallel_for(0, m.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      LoraBlock b = block_of(m, factors, index);
      if (bits == 0) {
        copy_rows(m, index * kLoraRows, b.rows, escape + end_of[index] * m.item());
        continue;
      }
      b.bits = bits;
      b.code_stride = m.groups() * bits;
      b.codes = const_cast<uint32_t*>(code) + index * kLoraRows * b.code_stride;
      b.escapes = const_cast<char*>(escape) + end_of[index] * m.item();
      checksum += kernels.unmerge(b).checksum;
    }
  });
  return checksum;
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
  auto& [codes, escapes, ends, checksums] = records;
  for (size_t i = 0; i < matrices.size(); ++i) {
    Merged merged = merge_one(weights[i], matrices[i], packer.pack(matrices[i], kernels), kernels);
    codes.push_back(std::move(merged.codes));
    escapes.push_back(std::move(merged.escapes));
    ends.push_back(std::move(merged.ends));
    checksums.push_back(merged.checksum);
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
  for (size_t i = 0; i < count; ++i)
    bits.push_back(check_record(matrices[i], weights[i], codes[i], escapes[i], ends[i]));
  const LoraKernels kernels = lora_units().kernels;
  Packer packer;
  std::vector<int64_t> checksums;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& m = matrices[i];
    static const std::vector<LoraFactor> none;
    const auto& factors = bits[i] ? packer.pack(m, kernels) : none;
    checksums.push_back(unmerge_one(m, factors, kernels, bits[i], codes[i], escapes[i], ends[i]));
  }
  return checksums;
}

}  // namespace sgld
