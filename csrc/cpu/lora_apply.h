// lora_apply for one ISA: y += scale * (x down^T) up^T on some rows, all in fp32 until y is rounded. Each element's
// sums have an order of their own, so a row's result does not depend on the rows beside it.
#pragma once

#include "lora_block.h"

namespace sgld {

// Packed as the right side of a product: columns are ranks in down, and outputs in up.
struct LoraApplyFactor {
  LoraFactor down, up;  // their `rank` is the length of the sums: columns of x, ranks
  int64_t ranks = 0, outputs = 0, start = 0;
  float scale = 0;
};

struct LoraApplyRows {
  const LoraApplyFactor* factors = nullptr;
  int64_t factor_count = 0;
  const int64_t* rows = nullptr;  // which of x and y
  int64_t count = 0;              // at most kLoraRows
  const void* x = nullptr;
  void* y = nullptr;
  DType x_dtype = DType::f32, y_dtype = DType::f32;
  int64_t width = 0, out = 0;  // of contiguous x and y
  int64_t most_ranks = 0;      // of any factor, even
};

// Floats of scratch, which is private to the calling thread.
static inline int64_t lora_apply_scratch(const LoraApplyRows& r) {
  return kLoraRows * (r.width + 1 + r.most_ranks + r.out);
}

namespace {  // each ISA file keeps its own

template <class V>
struct LoraApply {
  template <class T>
  static void load_row(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::load(from + i).store(to + i);
    for (; i < n; ++i) to[i] = widen(from[i]);
  }

  template <class T>
  static void store_row(const float* from, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::load(from + i).store(to + i);
    for (; i < n; ++i) narrow(from[i], to + i);
  }

  static void load_any(const void* data, DType dtype, int64_t at, int64_t n, float* to) {
    switch (dtype) {
      case DType::f32:
        return load_row(static_cast<const float*>(data) + at, n, to);
      case DType::bf16:
        return load_row(static_cast<const bf16*>(data) + at, n, to);
      case DType::f16:
        return load_row(static_cast<const f16*>(data) + at, n, to);
    }
  }

  static void store_any(const float* from, int64_t n, void* data, DType dtype, int64_t at) {
    switch (dtype) {
      case DType::f32:
        return store_row(from, n, static_cast<float*>(data) + at);
      case DType::bf16:
        return store_row(from, n, static_cast<bf16*>(data) + at);
      case DType::f16:
        return store_row(from, n, static_cast<f16*>(data) + at);
    }
  }

  // f(row, first column, columns, its products) for each row and panel of left [count][f.rank] times f.down.
  template <class F>
  static void product(LoraFactor f, const float* left, int64_t columns, int64_t count, F each) {
    alignas(64) float panel[kLoraRows * kLoraPanel];
    f.up = left;
    f.up_stride = f.rank;
    const LoraBlock block;
    for (int64_t column = 0; column < columns; column += kLoraPanel) {
      const int64_t most = columns - column < kLoraPanel ? columns - column : kLoraPanel;
      const int64_t group = column / kLoraGroup;
      LoraChains<V>::add(f, {block, 0, count}, group, group + ceil_div(most, kLoraGroup),
                         LoraTurn::only, panel);
      for (int64_t row = 0; row < count; ++row) each(row, column, most, panel + row * kLoraPanel);
    }
  }

  static void run(const LoraApplyRows& r, float* scratch) {
    const int64_t width = ceil_div(r.width, 2) * 2;
    float* x = scratch;
    float* hidden = x + kLoraRows * width;
    float* y = hidden + kLoraRows * r.most_ranks;
    for (int64_t i = 0; i < r.count; ++i) {
      load_any(r.x, r.x_dtype, r.rows[i] * r.width, r.width, x + i * width);
      if (width > r.width) x[i * width + r.width] = 0.0f;
      load_any(r.y, r.y_dtype, r.rows[i] * r.out, r.out, y + i * r.out);
    }
    for (int64_t n = 0; n < r.factor_count; ++n) {
      const LoraApplyFactor& f = r.factors[n];
      product(f.down, x, f.ranks, r.count,
              [&](int64_t row, int64_t column, int64_t columns, const float* from) {
                float* to = hidden + row * f.up.rank + column;
                std::memcpy(to, from, columns * sizeof(float));
                if (column + columns == f.ranks && f.ranks < f.up.rank) to[columns] = 0.0f;
              });
      const V scale = V::set(f.scale);
      product(f.up, hidden, f.outputs, r.count,
              [&](int64_t row, int64_t column, int64_t columns, const float* from) {
                float* to = y + row * r.out + f.start + column;
                int64_t j = 0;
                for (; j + V::width <= columns; j += V::width)
                  lora_fma(scale, V::load(from + j), V::load(to + j)).store(to + j);
                for (; j < columns; ++j) {
                  float lanes[V::width];
                  lora_fma(scale, V::set(from[j]), V::set(to[j])).store(lanes);
                  to[j] = lanes[0];
                }
              });
    }
    for (int64_t i = 0; i < r.count; ++i)
      store_any(y + i * r.out, r.out, r.y, r.y_dtype, r.rows[i] * r.out);
  }
};

}  // namespace

using LoraApplyRun = void (*)(const LoraApplyRows&, float* scratch);
LoraApplyRun lora_apply_scalar();
LoraApplyRun lora_apply_avx2();
LoraApplyRun lora_apply_avx512();

}  // namespace sgld
