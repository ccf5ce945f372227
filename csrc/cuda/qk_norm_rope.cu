// qk_norm_rope on the GPU: RMSNorm of q and k over a token or a head, then the rotary embedding. One block per token of q
// or of k; a thread holds 16 elements of one head as two chunks: for half-split rotation 8 of either half of the head, for
// interleaved rotation 16 consecutive ones, so that it holds both members of every pair that it rotates.
#include <optional>

#include "../torch_view.h"
#include "cuda_ops.h"
#include "launch.h"
#include "rows.cuh"

namespace sgld {
namespace {

constexpr const char* kRope = "qk_norm_rope";

// One of q and k: [B, S, H, d] with a dense last dimension.
struct Heads {
  const void* data = nullptr;
  void* out = nullptr;
  Rows weight;
  int64_t batch = 0, token = 0, head = 0;
  int64_t out_batch = 0, out_token = 0, out_head = 0;
  unsigned tokens = 0, heads = 0;
};

struct Rope {
  Heads q, k;
  const float* cos = nullptr;  // [S, d / 2], nullptr for no rotation
  const float* sin = nullptr;
  unsigned q_rows = 0;
  int dim = 0;
  float eps = 0;
  bool full = false;
};

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads) qk_norm_rope_kernel(const Rope p) {
  constexpr int kChunk = kChunkElements;
  const bool is_q = blockIdx.x < p.q_rows;
  const Heads& x = is_q ? p.q : p.k;
  const unsigned row = is_q ? blockIdx.x : blockIdx.x - p.q_rows;
  const int64_t b = row / x.tokens, s = row % x.tokens;
  const int lanes = p.dim / kRopeElements;
  const unsigned head = threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const bool inside = head < x.heads;
  // Where the two chunks start in the head.
  const int first = lane * (kInterleaved ? 2 * kChunk : kChunk);
  const int second = first + (kInterleaved ? kChunk : p.dim / 2);

  float a[kChunk], c[kChunk];
#pragma unroll
  for (int j = 0; j < kChunk; ++j) a[j] = c[j] = 0.0f;
  if (inside) {
    const T* from = static_cast<const T*>(x.data) + b * x.batch + s * x.token + head * x.head;
    load<kChunk>(from + first, a);
    load<kChunk>(from + second, c);
  }
  if (x.weight.data) {
    float square = 0.0f;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) square += a[j] * a[j] + c[j] * c[j];
    float count = static_cast<float>(p.dim);
    if (p.full) {
      square = block_sum(square);
      count *= static_cast<float>(x.heads);
    } else {
      for (int step = lanes / 2; step > 0; step /= 2)
        square += __shfl_xor_sync(0xffffffffu, square, step);
    }
    const float rstd = 1.0f / sqrtf(square / count + p.eps);
    if (inside) {
      const int64_t at = p.full ? static_cast<int64_t>(head) * p.dim : 0;
      float m[kChunk];
      load<kChunk>(x.weight, at, first, m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) a[j] *= rstd * m[j];
      load<kChunk>(x.weight, at, second, m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) c[j] *= rstd * m[j];
    }
  }
  if (!inside) return;
  if (p.cos) {
    // Either way the thread holds pairs 8 * lane to 8 * lane + 7 of its head.
    float cosine[kChunk], sine[kChunk];
    load<kChunk>(p.cos + s * (p.dim / 2) + lane * kChunk, cosine);
    load<kChunk>(p.sin + s * (p.dim / 2) + lane * kChunk, sine);
    if constexpr (kInterleaved) {
#pragma unroll
      for (int j = 0; j < kChunk; j += 2) {
        const float a0 = a[j], a1 = a[j + 1], c0 = c[j], c1 = c[j + 1];
        const int i = j / 2, k = kChunk / 2 + j / 2;
        a[j] = a0 * cosine[i] - a1 * sine[i];
        a[j + 1] = a0 * sine[i] + a1 * cosine[i];
        c[j] = c0 * cosine[k] - c1 * sine[k];
        c[j + 1] = c0 * sine[k] + c1 * cosine[k];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const float a0 = a[j], c0 = c[j];
        a[j] = a0 * cosine[j] - c0 * sine[j];
        c[j] = a0 * sine[j] + c0 * cosine[j];
      }
    }
  }
  T* to = static_cast<T*>(x.out) + b * x.out_batch + s * x.out_token + head * x.out_head;
  store<kChunk>(to + first, a);
  store<kChunk>(to + second, c);
}

template <class T>
void launch(const Rope& p, unsigned rows, unsigned threads, bool interleaved, cudaStream_t stream) {
  if (interleaved)
    qk_norm_rope_kernel<T, true><<<rows, threads, 0, stream>>>(p);
  else
    qk_norm_rope_kernel<T, false><<<rows, threads, 0, stream>>>(p);
}

void check_aligned(const char* name, const View& view) {
  const int64_t per_load = 16 / size_of(view.dtype);
  bool fits = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < view.ndim - 1; ++i) fits = fits && view.strides[i] % per_load == 0;
  if (!fits || view.strides[view.ndim - 1] != 1)
    fail(kRope, name, " must have dense heads that start at multiples of 16 bytes");
}

Heads bind(const char* name, const char* weight_name, const View& x, const View& out,
           const View& weight, bool full) {
  if (x.ndim != 4) fail(kRope, name, ' ', shape_of(x), " must be [B, S, H, d]");
  const int64_t width = full ? x.sizes[2] * x.sizes[3] : x.sizes[3];
  if (weight.present && (weight.ndim != 1 || weight.sizes[0] != width))
    fail(kRope, weight_name, ' ', shape_of(weight), " must be [", width, ']');
  for (int i = 0; i < 4; ++i)
    if (out.ndim != 4 || out.sizes[i] != x.sizes[i] || out.dtype != x.dtype)
      fail(kRope, "the result for ", name, ' ', shape_of(out), " differs from ", shape_of(x));
  if (x.sizes[0] * x.sizes[1] * x.sizes[2] * x.sizes[3] > 0) {
    check_aligned(name, x);
    check_aligned("its result", out);
    if (weight.present) check_aligned(weight_name, weight);
  }
  Heads heads;
  heads.data = x.data;
  heads.weight = {weight.data, weight.dtype, 0, 0};
  heads.batch = x.strides[0];
  heads.token = x.strides[1];
  heads.head = x.strides[2];
  heads.out_batch = out.strides[0];
  heads.out_token = out.strides[1];
  heads.out_head = out.strides[2];
  heads.tokens = static_cast<unsigned>(x.sizes[1]);
  heads.heads = static_cast<unsigned>(x.sizes[2]);
  return heads;
}

const float* bind_angles(const char* name, const View& view, int64_t tokens, int64_t dim) {
  if (!view.present) return nullptr;
  if (view.ndim != 2 || view.sizes[0] != tokens || view.sizes[1] != dim / 2 ||
      view.dtype != DType::f32)
    fail(kRope, name, ' ', shape_of(view), " must be float32 [", tokens, ", ", dim / 2, ']');
  if (view.strides[1] != 1 || view.strides[0] != dim / 2) fail(kRope, name, " must be contiguous");
  return static_cast<const float*>(view.data);
}

}  // namespace

void qk_norm_rope_cuda(const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight_q,
                       const std::optional<Tensor>& weight_k, const std::optional<Tensor>& cos,
                       const std::optional<Tensor>& sin, double eps, bool full, bool interleaved,
                       Tensor out_q, Tensor out_k) {
  constexpr const char* op = kRope;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const View q_view = view_of(op, "q", q);
  const View k_view = view_of(op, "k", std::optional<Tensor>(k), q);
  Rope p;
  p.q = bind("q", "weight_q", q_view, view_of(op, "out_q", std::optional<Tensor>(out_q), q),
             view_of(op, "weight_q", weight_q, q), full);
  p.k = bind("k", "weight_k", k_view, view_of(op, "out_k", std::optional<Tensor>(out_k), q),
             view_of(op, "weight_k", weight_k, q), full);
  const int64_t dim = q_view.sizes[3];
  if (k_view.sizes[3] != dim || k_view.dtype != q_view.dtype)
    fail(op, "q ", shape_of(q_view), " and k ", shape_of(k_view), " differ in d or dtype");
  p.cos = bind_angles("cos", view_of(op, "cos", cos, q), q_view.sizes[1], dim);
  p.sin = bind_angles("sin", view_of(op, "sin", sin, q), q_view.sizes[1], dim);
  if ((p.cos == nullptr) != (p.sin == nullptr)) fail(op, "cos and sin come together");
  if (p.cos && k_view.sizes[1] != q_view.sizes[1])
    fail(op, "k has ", k_view.sizes[1], " tokens where q has ", q_view.sizes[1]);
  const int64_t heads = q_view.sizes[2] > k_view.sizes[2] ? q_view.sizes[2] : k_view.sizes[2];
  const unsigned threads = rope_threads(heads, dim, full);
  if (threads == 0) fail(op, heads, " heads of ", dim, " do not fit a block");
  p.dim = static_cast<int>(dim);
  p.eps = static_cast<float>(eps);
  p.full = full;
  p.q.out = out_q.mutable_data_ptr();
  p.k.out = out_k.mutable_data_ptr();
  const int64_t q_rows = q_view.sizes[0] * q_view.sizes[1];
  const int64_t rows = q_rows + k_view.sizes[0] * k_view.sizes[1];
  if (rows > 0x7fffffff) fail(op, "more than 2^31 - 1 rows");
  p.q_rows = static_cast<unsigned>(q_rows);
  if (rows == 0 || heads == 0) return;

  const cudaStream_t stream = current_stream(op, q.get_device_index());
  const auto grid = static_cast<unsigned>(rows);
  if (q_view.dtype == DType::f32)
    launch<float>(p, grid, threads, interleaved, stream);
  else if (q_view.dtype == DType::bf16)
    launch<__nv_bfloat16>(p, grid, threads, interleaved, stream);
  else
    launch<__half>(p, grid, threads, interleaved, stream);
  check_launch(op);
}

}  // namespace sgld
