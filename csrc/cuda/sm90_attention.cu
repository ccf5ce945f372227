// Attention forward with log-sum-exp for sm_90a. A block stays on its multiprocessor and takes one tile of 128 queries
// after another. Its first warpgroup only starts copies: the copy engine (TMA) brings queries, keys and values into
// rings of shared memory, and barriers there say what is full and what is free. The other two warpgroups take 64
// queries each and multiply by wgmma. They take turns (ping-pong): while one has its products in the matrix units, the
// other one computes its softmax. Within a warpgroup the scores of the next keys are under way together with the product
// of the last probabilities and values.
//
// Keys go from the last tile to the first, so that the only tile that may not be full is the first one seen.
#include "attention_call.h"
#include "cuda_ops.h"
#include "launch.h"
#include "sgld/sm90_attention.h"
#include "sm90.cuh"
#include "tensor_map.h"

namespace sgld {
namespace {

constexpr float kLn2 = 0.69314718055994531f;
constexpr int kConsumerWarps = kSm90Consumers * kSm90Warpgroup / 32;

// Named barriers; 0 is __syncthreads.
constexpr int kTurn = 1;                      // + consumer: it may start its products
constexpr int kOwn = kTurn + kSm90Consumers;  // + consumer: its threads among themselves

struct Sm90Call {
  AttentionCall call;
  int64_t tiles = 0;
  int blocks = 0, heads = 0;
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Barriers of a block by shared address.
struct Barriers {
  uint32_t base;
  __device__ uint32_t k_full(int stage) const { return base + stage * 8; }
  __device__ uint32_t k_empty(int stage) const { return base + (kSm90Stages + stage) * 8; }
  __device__ uint32_t v_full(int stage) const { return base + (2 * kSm90Stages + stage) * 8; }
  __device__ uint32_t v_empty(int stage) const { return base + (3 * kSm90Stages + stage) * 8; }
  __device__ uint32_t q_full() const { return base + 4 * kSm90Stages * 8; }
  __device__ uint32_t q_empty() const { return base + (4 * kSm90Stages + 1) * 8; }
};

// One tile of work: where its queries and keys begin, and how many there are.
struct Work {
  int first_query, head, batch;
  int row_q, row_k;  // of the sequence in its tensors
  int queries, keys;
};

// False where a packed sequence is shorter than the longest one.
__device__ __forceinline__ bool work_of(const Sm90Call& p, int64_t index, Work& w) {
  const Sm90Tile tile = sm90_tile(index, p.blocks, p.heads);
  w = {tile.first_query, tile.head, tile.sequence, 0, 0, p.call.queries, p.call.keys};
  if (p.call.cu_q) {
    w.batch = 0;
    w.row_q = p.call.cu_q[tile.sequence];
    w.row_k = p.call.cu_k[tile.sequence];
    w.queries = p.call.cu_q[tile.sequence + 1] - w.row_q;
    w.keys = p.call.cu_k[tile.sequence + 1] - w.row_k;
  }
  return w.first_query < w.queries;
}

template <int kDim>
struct Kernel {
  static constexpr int kKeys = sm90_keys(kDim);
  static constexpr int kColumns = kDim / kSm90Column;
  static constexpr int kStageBytes = sm90_tile_bytes(kKeys, kDim);
  static constexpr Sm90Shared kAt = sm90_shared(kDim);
  using Scores = Sm90Product<kKeys>;
  using Output = Sm90Product<kDim, true>;

  uint32_t base;
  Barriers barrier;

  // ---- the producer: one thread ----

  __device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* map, uint32_t full,
                                            int rows, int token, const Work& w) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      copy_box(to + c * rows * kSm90RowBytes, map, full, c * kSm90Column, token, w.head, w.batch);
  }

  __device__ __forceinline__ void produce(const Sm90Call& p, const CUtensorMap* q,
                                          const CUtensorMap* k, const CUtensorMap* v) const {
    Sm90Ring ring;  // keys and values go in step
    uint32_t q_phase = 0;
    for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      Work w;
      if (!work_of(p, index, w)) continue;
      barrier_wait(barrier.q_empty(), q_phase ^ 1);
      q_phase ^= 1;
      barrier_expect(barrier.q_full(), sm90_tile_bytes(kSm90Queries, kDim));
      copy_tile(base + kAt.q, q, barrier.q_full(), kSm90Queries, w.row_q + w.first_query, w);
#pragma unroll 1
      for (int step = sm90_steps(w.keys, kKeys) - 1; step >= 0; --step, ring.next()) {
        const int token = w.row_k + step * kKeys;
        barrier_wait(barrier.k_empty(ring.stage), ring.phase ^ 1);
        barrier_expect(barrier.k_full(ring.stage), kStageBytes);
        copy_tile(base + kAt.k + ring.stage * kStageBytes, k, barrier.k_full(ring.stage), kKeys,
                  token, w);
        barrier_wait(barrier.v_empty(ring.stage), ring.phase ^ 1);
        barrier_expect(barrier.v_full(ring.stage), kStageBytes);
        copy_tile(base + kAt.v + ring.stage * kStageBytes, v, barrier.v_full(ring.stage), kKeys,
                  token, w);
      }
    }
  }

  // ---- a consumer: a warpgroup ----

  // scores [64 x kKeys] = queries times keys.
  __device__ __forceinline__ void score(typename Scores::Sum& s, int consumer, int stage) const {
    const uint32_t q = base + kAt.q + consumer * kSm90Rows * kSm90RowBytes;
    const uint32_t k = base + kAt.k + stage * kStageBytes;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      Scores::of_shared(s, sm90_descriptor(q + sm90_step_along_row(step, kSm90Queries), 0),
                        sm90_descriptor(k + sm90_step_along_row(step, kKeys), 0), step > 0);
  }

  // out [64 x kDim] += probabilities times values.
  __device__ __forceinline__ void weigh(typename Output::Sum& o, const uint32_t* share,
                                        int stage) const {
    const uint32_t v = base + kAt.v + stage * kStageBytes;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      Output::of_registers(o, share + 4 * step,
                           sm90_descriptor(v + sm90_step_down(step), kKeys * kSm90RowBytes));
  }

  // Values behind the end of a packed sequence are those of the next one: they must not meet a probability of zero as
  // infinity or NaN. Both consumers write the same zeros.
  __device__ __forceinline__ void clear_values(int stage, int from, int consumer) const {
    const int thread = threadIdx.x % kSm90Warpgroup;
    for (int i = from * 8 + thread; i < kKeys * 8; i += kSm90Warpgroup)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint32_t at = base + kAt.v + stage * kStageBytes + c * kKeys * kSm90RowBytes + i * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(at), "r"(0) : "memory");
      }
    fence_async();
    named_sync(kOwn + consumer, kSm90Warpgroup);
  }

  struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, keep[2];
  };

  // Scores to probabilities of the highest score so far; `keep` is what earlier sums are multiplied with.
  static __device__ __forceinline__ void normalise(typename Scores::Sum& s, Softmax& soft,
                                                   float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 2 * r; i < Scores::kRegisters; i += 4)
        highest = fmaxf(highest, fmaxf(s[i], s[i + 1]));
      // The four threads of a row.
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      // Every tile has at least one key: the maximum is finite.
      const float higher = fmaxf(soft.top[r], highest * scale_log2);
      soft.keep[r] = exp2_fast(soft.top[r] - higher);
      soft.top[r] = higher;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * r; i < Scores::kRegisters; i += 4)
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          s[j] = exp2_fast(fmaf(s[j], scale_log2, -higher));
          sum += s[j];
        }
      soft.total[r] = fmaf(soft.total[r], soft.keep[r], sum);  // of this thread's columns
    }
  }

  // The assembler would move all of the softmax behind the next wait for products, were its sums not used before it. No
  // sum of exponentials is negative: nothing is stored.
  __device__ __forceinline__ void finish(const Softmax& soft) const {
    asm volatile(
        "{\n.reg .pred p;\nsetp.lt.f32 p, %1, 0f00000000;\n@p st.shared.f32 [%0], %1;\n}\n" ::"r"(
            base),
        "f"(fminf(soft.total[0], soft.total[1]))
        : "memory");
  }

  // Two result fragments of the scores are one operand fragment of 16 keys.
  static __device__ __forceinline__ void as_operand(const typename Scores::Sum& s,
                                                    uint32_t (&share)[Scores::kRegisters / 2]) {
#pragma unroll
    for (int i = 0; i < Scores::kRegisters / 2; ++i) share[i] = pack(s[2 * i], s[2 * i + 1]);
  }

  static __device__ __forceinline__ void mask(typename Scores::Sum& s, int left, int thread) {
#pragma unroll
    for (int i = 0; i < Scores::kRegisters; ++i)
      if (sm90_column(thread, i) >= left) s[i] = -INFINITY;
  }

  static __device__ __forceinline__ void release(uint32_t empty) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
  }

  __device__ __forceinline__ void consume(const Sm90Call& p) const {
    // By a shuffle, which tells the compiler that all lanes have the same.
    const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / kSm90Warpgroup, 0) - 1;
    const int other = consumer ^ 1;
    const int thread = threadIdx.x % kSm90Warpgroup;
    Sm90Ring k_ring, v_ring;
    uint32_t q_phase = 0;
    for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      Work w;
      if (!work_of(p, index, w)) continue;
      typename Output::Sum out;
#pragma unroll
      for (int i = 0; i < Output::kRegisters; ++i) out[i] = 0.0f;
      Softmax soft;
      const int steps = sm90_steps(w.keys, kKeys);
      barrier_wait(barrier.q_full(), q_phase);
      q_phase ^= 1;
      if (steps > 0) {
        typename Scores::Sum scores;
        uint32_t share[Scores::kRegisters / 2];
        const int left = w.keys - (steps - 1) * kKeys;  // keys of the last tile
        barrier_wait(barrier.k_full(k_ring.stage), k_ring.phase);
        hold(scores);
        products_begin();
        score(scores, consumer, k_ring.stage);
        products_commit();
        products_wait<0>();
        hold(scores);
        release(barrier.k_empty(k_ring.stage));
        k_ring.next();
        if (left < kKeys) mask(scores, left, thread);
        normalise(scores, soft, p.call.scale_log2);
        as_operand(scores, share);

        if (steps > 1 && consumer == 1) named_arrive(kTurn, kSm90Consumers * kSm90Warpgroup);
#pragma unroll 1
        for (int step = steps - 2; step >= 0; --step) {
          barrier_wait(barrier.k_full(k_ring.stage), k_ring.phase);
          barrier_wait(barrier.v_full(v_ring.stage), v_ring.phase);
          if (p.call.cu_k && step == steps - 2 && left < kKeys)
            clear_values(v_ring.stage, left, consumer);
          named_sync(kTurn + consumer, kSm90Consumers * kSm90Warpgroup);
          hold(out);
          hold(share);
          hold(scores);
          products_begin();
          score(scores, consumer, k_ring.stage);
          products_commit();
          weigh(out, share, v_ring.stage);
          products_commit();
          // The first consumer's turn of the next step comes after this one of the second; there is none after the
          // last.
          if (consumer == 0 || step > 0)
            named_arrive(kTurn + other, kSm90Consumers * kSm90Warpgroup);
          products_wait<1>();
          hold(scores);
          release(barrier.k_empty(k_ring.stage));
          k_ring.next();
          normalise(scores, soft, p.call.scale_log2);
          finish(soft);
          products_wait<0>();
          hold(out);
          hold(share);
          release(barrier.v_empty(v_ring.stage));
          v_ring.next();
#pragma unroll
          for (int i = 0; i < Output::kRegisters; ++i) out[i] *= soft.keep[i / 2 % 2];
          as_operand(scores, share);
        }

        barrier_wait(barrier.v_full(v_ring.stage), v_ring.phase);
        if (p.call.cu_k && steps == 1 && left < kKeys) clear_values(v_ring.stage, left, consumer);
        hold(out);
        hold(share);
        products_begin();
        weigh(out, share, v_ring.stage);
        products_commit();
        products_wait<0>();
        hold(out);
        release(barrier.v_empty(v_ring.stage));
        v_ring.next();
      }
      store(p.call, w, out, soft, consumer, thread);
    }
  }

  // Through the shared memory of the queries, which are used up, so that rows are written in 16-byte pieces.
  __device__ __forceinline__ void store(const AttentionCall& p, const Work& w,
                                        const typename Output::Sum& out, const Softmax& soft,
                                        int consumer, int thread) const {
    const int first = w.first_query + consumer * kSm90Rows;
    const uint32_t rows = base + kAt.q + consumer * kSm90Rows * kSm90RowBytes;
    float* lse = p.lse + w.batch * p.lse_batch + w.head * p.lse_head + w.row_q;
    named_sync(kOwn + consumer, kSm90Warpgroup);  // all four warps are done with the queries
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = soft.total[r];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      const int row = sm90_row(thread, 2 * r);
#pragma unroll
      for (int i = 2 * r; i < Output::kRegisters; i += 4) {
        const int column = sm90_column(thread, i);
        const uint32_t at = rows + column / kSm90Column * (kSm90Queries * kSm90RowBytes) +
                            sm90_swizzled(row, column % kSm90Column / 8) + column % 8 * 2;
        const uint32_t both = pack(out[i] * inverse, out[i + 1] * inverse);
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(at), "r"(both) : "memory");
      }
      if (thread % 4 == 0 && first + row < w.queries)
        lse[first + row] = total > 0.0f ? (soft.top[r] + log2f(total)) * kLn2 : -INFINITY;
    }
    named_sync(kOwn + consumer, kSm90Warpgroup);
    __nv_bfloat16* to = p.out + w.batch * p.at_out.batch + w.head * p.at_out.head +
                        static_cast<int64_t>(w.row_q + first) * p.at_out.token;
    constexpr int kPieces = kDim / 8;
#pragma unroll
    for (int i = 0; i < kSm90Rows * kPieces / kSm90Warpgroup; ++i) {
      const int index = i * kSm90Warpgroup + thread, row = index / kPieces, piece = index % kPieces;
      const uint32_t at =
          rows + piece / 8 * (kSm90Queries * kSm90RowBytes) + sm90_swizzled(row, piece % 8);
      uint4 x;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(at)
                   : "memory");
      if (first + row < w.queries)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to + row * p.at_out.token +
                                                                        piece * 8),
                     "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                     : "memory");
    }
    fence_async();  // the copy engine writes the next queries here
    __syncwarp();
    release(barrier.q_empty());
  }
};

template <int kDim>
__global__ void __launch_bounds__(kSm90Threads, 1)
    sm90_attention_kernel(const __grid_constant__ Sm90Call p, const __grid_constant__ CUtensorMap q,
                          const __grid_constant__ CUtensorMap k,
                          const __grid_constant__ CUtensorMap v) {
  extern __shared__ unsigned char shared[];
  const uint32_t base =
      (sm90_address(shared) + kSm90GroupBytes - 1) / kSm90GroupBytes * kSm90GroupBytes;
  const Kernel<kDim> kernel{base, {base + sm90_shared(kDim).barriers}};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kSm90Stages; ++stage) {
      barrier_init(kernel.barrier.k_full(stage), 1);
      barrier_init(kernel.barrier.v_full(stage), 1);
      barrier_init(kernel.barrier.k_empty(stage), kConsumerWarps);
      barrier_init(kernel.barrier.v_empty(stage), kConsumerWarps);
    }
    barrier_init(kernel.barrier.q_full(), 1);
    barrier_init(kernel.barrier.q_empty(), kConsumerWarps);
    barrier_init_done();
    prefetch_map(&q);
    prefetch_map(&k);
    prefetch_map(&v);
  }
  __syncthreads();
  if (threadIdx.x < kSm90Warpgroup) {
    give_registers<kSm90ProducerRegisters>();
    if (threadIdx.x == 0) kernel.produce(p, &q, &k, &v);
  } else {
    take_registers<kSm90ConsumerRegisters>();
    kernel.consume(p);
  }
}

template <int kDim>
void launch(const Sm90Call& p, const CUtensorMap (&maps)[3], unsigned grid, cudaStream_t stream) {
  constexpr int kShared = sm90_shared_bytes(kDim);
  const cudaError_t error = cudaFuncSetAttribute(
      sm90_attention_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) fail(kAttention, "no shared memory: ", cudaGetErrorString(error));
  sm90_attention_kernel<kDim>
      <<<grid, kSm90Threads, kShared, stream>>>(p, maps[0], maps[1], maps[2]);
}

}  // namespace

void attention_sm90_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                         const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                         int64_t max_q, Tensor out, Tensor lse) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  AttentionSizes sizes;
  Sm90Call p;
  p.call = bind_attention(q, k, v, scale, cu_q, cu_k, max_q, out, lse, sizes);
  if (sizes.sequences == 0) return;
  p.blocks = static_cast<int>((sizes.longest + kSm90Queries - 1) / kSm90Queries);
  p.heads = static_cast<int>(sizes.heads);
  p.tiles = sizes.sequences * p.heads * p.blocks;
  const auto map = [&](const char* name, const void* data, int64_t tokens,
                       const AttentionStrides& at, int rows) {
    return map_of(kAttention, name, data,
                  {sizes.batch, tokens, sizes.heads, sizes.dim, at.batch, at.token, at.head}, rows);
  };
  const AttentionCall& call = p.call;
  const int keys = sm90_keys(static_cast<int>(sizes.dim));
  CUtensorMap maps[3];
  maps[0] = map("q", call.q, call.queries, call.at_q, kSm90Queries);
  // Without keys nothing is copied from these two.
  maps[1] = call.keys > 0 ? map("k", call.k, call.keys, call.at_k, keys) : maps[0];
  maps[2] = call.keys > 0 ? map("v", call.v, call.keys, call.at_v, keys) : maps[0];
  int processors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) fail(kAttention, "no device: ", cudaGetErrorString(error));
  const unsigned grid = sm90_grid(p.tiles, processors);
  const cudaStream_t stream = current_stream(kAttention, device);
  if (sizes.dim == 64)
    launch<64>(p, maps, grid, stream);
  else
    launch<128>(p, maps, grid, stream);
  check_launch(kAttention);
}

}  // namespace sgld
