// Tensors of one shape as rows: the part of the boundary checks that the memory-bound ops share.
#pragma once

#include "sgld/check.h"
#include "sgld/norm_modulate.h"

namespace sgld {

inline int64_t count(const View& view) {
  int64_t n = 1;
  for (int i = 0; i < view.ndim; ++i) n *= view.sizes[i];
  return n;
}

inline bool is_contiguous(const View& view) {
  if (count(view) == 0) return true;
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.sizes[i] != 1 && view.strides[i] != stride) return false;
    stride *= view.sizes[i];
  }
  return true;
}

// `view` has the shape and, if `same_dtype`, the dtype of `x`, the tensor called "x" or "gate" there.
inline void check_like(const char* op, const char* name, const View& view, const View& x,
                       bool same_dtype = true) {
  if (view.ndim != x.ndim)
    fail(op, name, ' ', shape_of(view), " must have the shape ", shape_of(x));
  constexpr const char* kNames[] = {"D", "S", "B"};
  for (int i = 0; i < view.ndim; ++i) {
    const int from_end = view.ndim - 1 - i;
    const char* size = from_end < 3 ? kNames[from_end] : "a leading size";
    check_size(op, name, view, i, {size, x.sizes[i]});
  }
  if (same_dtype && view.dtype != x.dtype) fail(op, name, " has another dtype than x");
}

// The rows of a tensor of up to three dimensions, or of a contiguous one.
inline Rows rows_of(const char* op, const char* name, const View& view) {
  const int n = view.ndim;
  if (n == 0) fail(op, name, " has no dimension");
  if (view.sizes[n - 1] > 1 && view.strides[n - 1] != 1)
    fail(op, name, " must be dense in its last dimension");
  if (n > 3 && !is_contiguous(view)) fail(op, name, " of ", n, " dimensions must be contiguous");
  return {view.data, view.dtype, n == 3 ? view.strides[0] : 0, n > 1 ? view.strides[n - 2] : 0};
}

// [B, S, D] of rows_of: three dimensions as they are, others with B = 1.
inline void sizes_of(const View& view, int64_t& B, int64_t& S, int64_t& D) {
  D = view.sizes[view.ndim - 1];
  B = view.ndim == 3 ? view.sizes[0] : 1;
  S = 1;
  for (int i = view.ndim == 3 ? 1 : 0; i < view.ndim - 1; ++i) S *= view.sizes[i];
}

}  // namespace sgld
