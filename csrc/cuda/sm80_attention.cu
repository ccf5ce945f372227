// Attention forward with log-sum-exp for sm_80 and later: mma.m16n8k16 in bf16, keys and values through shared memory by
// cp.async in two stages. One block takes 64 queries of one head, a warp 16 of them; nothing is shared between warps but
// the tiles. Rows of a tile are padded by 16 bytes, so that the 8 rows of an ldmatrix lie in different banks.
#include <cuda_bf16.h>

#include "attention_call.h"
#include "cuda_ops.h"
#include "launch.h"
#include "sgld/cuda_launch.h"

namespace sgld {
namespace {

constexpr int kM = kAttentionQueries, kN = kAttentionKeys;
constexpr int kThreads = kAttentionThreads;
constexpr float kLn2 = 0.69314718055994531f;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory; zeros where there is no source.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const __nv_bfloat16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const __nv_bfloat16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

// c [16 x 8] += a [16 x 16] b [16 x 8].
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Rows first.. of [count, kDim] to a tile; rows past the end become zeros.
template <int kDim>
__device__ __forceinline__ void load_tile(__nv_bfloat16* tile, const __nv_bfloat16* rows,
                                          int64_t stride, int first, int count) {
  constexpr int kPieces = kDim / 8;  // 16 bytes each
#pragma unroll
  for (int i = threadIdx.x; i < kN * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool there = first + row < count;
    // The source of a missing row is not read, but it must be an address.
    const __nv_bfloat16* from = rows + (there ? (first + row) * stride : 0) + piece * 8;
    copy_async(tile + row * (kDim + kAttentionPad) + piece * 8, from, there);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) sm80_attention_kernel(const AttentionCall p) {
  constexpr int kRow = kDim + kAttentionPad;
  constexpr int kTile = kN * kRow;
  extern __shared__ __align__(16) unsigned char shared[];
  __nv_bfloat16* tiles = reinterpret_cast<__nv_bfloat16*>(shared);  // K, K, V, V
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const int g = lane / 4, t = lane % 4;  // row and pair of columns of a fragment

  const int64_t b = blockIdx.z, head = blockIdx.y;
  int64_t first_q = 0, first_k = 0, batch = b;
  int queries = p.queries, keys = p.keys;
  if (p.cu_q) {
    first_q = p.cu_q[b];
    first_k = p.cu_k[b];
    queries = p.cu_q[b + 1] - p.cu_q[b];
    keys = p.cu_k[b + 1] - p.cu_k[b];
    batch = 0;
  }
  const int start = blockIdx.x * kM;
  if (start >= queries) return;
  const __nv_bfloat16* q = p.q + batch * p.at_q.batch + first_q * p.at_q.token + head * p.at_q.head;
  const __nv_bfloat16* k = p.k + batch * p.at_k.batch + first_k * p.at_k.token + head * p.at_k.head;
  const __nv_bfloat16* v = p.v + batch * p.at_v.batch + first_k * p.at_v.token + head * p.at_v.head;
  __nv_bfloat16* out =
      p.out + batch * p.at_out.batch + first_q * p.at_out.token + head * p.at_out.head;
  float* lse = p.lse + batch * p.lse_batch + head * p.lse_head + first_q;

  // The rows of this thread: fragments hold rows g and g + 8 of the warp's 16.
  const int rows[2] = {start + warp * 16 + g, start + warp * 16 + g + 8};
  uint32_t query[kDim / 16][4];
#pragma unroll
  for (int kk = 0; kk < kDim / 16; ++kk)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = rows[i % 2], column = kk * 16 + t * 2 + (i / 2) * 8;
      query[kk][i] =
          row < queries ? *reinterpret_cast<const uint32_t*>(q + row * p.at_q.token + column) : 0u;
    }

  float acc[kDim / 8][4];
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  const int steps = (keys + kN - 1) / kN;
  if (steps > 0) {
    load_tile<kDim>(tiles, k, p.at_k.token, 0, keys);
    load_tile<kDim>(tiles + 2 * kTile, v, p.at_v.token, 0, keys);
  }
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2, first = step * kN;
    if (step + 1 < steps) {
      load_tile<kDim>(tiles + (stage ^ 1) * kTile, k, p.at_k.token, first + kN, keys);
      load_tile<kDim>(tiles + (2 + (stage ^ 1)) * kTile, v, p.at_v.token, first + kN, keys);
    }
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const __nv_bfloat16* k_tile = tiles + stage * kTile;
    const __nv_bfloat16* v_tile = tiles + (2 + stage) * kTile;

    float score[kN / 8][4];
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = 0.0f;
#pragma unroll
      for (int kk = 0; kk < kDim / 32; ++kk) {
        uint32_t m[4];
        load_matrices(m, k_tile + (n * 8 + lane % 8) * kRow + kk * 32 + lane / 8 * 8);
        multiply(score[n], query[2 * kk], m[0], m[1]);
        multiply(score[n], query[2 * kk + 1], m[2], m[3]);
      }
    }
    if (first + kN > keys) {
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + n * 8 + t * 2 + i % 2 >= keys) score[n][i] = -INFINITY;
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        highest = fmaxf(highest, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
      // The four threads of a row.
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      // Every step has at least one key: the maximum is finite.
      const float higher = fmaxf(top[r], highest * p.scale_log2);
      const float keep = exp2f(top[r] - higher);
      top[r] = higher;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          score[n][i] = exp2f(score[n][i] * p.scale_log2 - higher);
          sum += score[n][i];
        }
      total[r] = total[r] * keep + sum;  // of this thread's columns; the row is added up last
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        acc[n][2 * r] *= keep;
        acc[n][2 * r + 1] *= keep;
      }
    }

#pragma unroll
    for (int m = 0; m < kN / 16; ++m) {
      // Two result fragments of the scores are one operand fragment of 16 keys.
      const uint32_t share[4] = {pack(score[2 * m][0], score[2 * m][1]),
                                 pack(score[2 * m][2], score[2 * m][3]),
                                 pack(score[2 * m + 1][0], score[2 * m + 1][1]),
                                 pack(score[2 * m + 1][2], score[2 * m + 1][3])};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t value[4];
        load_matrices_transposed(value,
                                 v_tile + (m * 16 + lane % 16) * kRow + n * 16 + lane / 16 * 8);
        multiply(acc[2 * n], share, value[0], value[1]);
        multiply(acc[2 * n + 1], share, value[2], value[3]);
      }
    }
    __syncthreads();  // the next copies overwrite this stage
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    if (rows[r] >= queries) continue;
    const float inverse = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + rows[r] * p.at_out.token + n * 8 + t * 2) =
          pack(acc[n][2 * r] * inverse, acc[n][2 * r + 1] * inverse);
    if (t == 0) lse[rows[r]] = total[r] > 0.0f ? (top[r] + log2f(total[r])) * kLn2 : -INFINITY;
  }
}

template <int kDim>
void launch(const AttentionCall& p, dim3 grid, cudaStream_t stream) {
  constexpr int kShared = attention_shared_bytes(kDim);
  const cudaError_t error = cudaFuncSetAttribute(
      sm80_attention_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) fail(kAttention, "no shared memory: ", cudaGetErrorString(error));
  sm80_attention_kernel<kDim><<<grid, kThreads, kShared, stream>>>(p);
}

}  // namespace

void attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                    const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                    int64_t max_q, Tensor out, Tensor lse) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  AttentionSizes sizes;
  const AttentionCall p = bind_attention(q, k, v, scale, cu_q, cu_k, max_q, out, lse, sizes);
  if (sizes.sequences == 0) return;
  const dim3 grid(attention_blocks(sizes.longest), static_cast<unsigned>(sizes.heads),
                  static_cast<unsigned>(sizes.sequences));
  const cudaStream_t stream = current_stream(kAttention, q.get_device_index());
  if (sizes.dim == 64)
    launch<64>(p, grid, stream);
  else
    launch<128>(p, grid, stream);
  check_launch(kAttention);
}

}  // namespace sgld
