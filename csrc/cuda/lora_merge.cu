// LoRA merge and unmerge of many matrices in one launch, bit for bit as on a CPU (sgld/lora.h). Blocks stay and take
// one tile of 48 x 128 weights after another. A thread has 8 neighbouring weights of two rows: 16 bytes of a 16-bit
// type, one byte of each word of codes. The update is made by fused multiply-adds from factors in shared memory, in the
// order that all processors keep; no fused operation is left to the compiler's choice.
#include "../lora_pass.h"
#include "launch.h"
#include "sgld/lora_pass.h"
#include "sgld/lora_piece.h"

namespace sgld {
namespace {

constexpr int kThreads = 384;
constexpr int kPieces = kLoraPanel / kLoraPiece;  // of a row of a tile
constexpr int kRowStep = kThreads / kPieces;      // rows that are worked on at a time
constexpr int kRowsEach = kLoraRows / kRowStep;   // of a thread
constexpr int kUpRow = kLoraChain + 4;            // padded: rows start in other banks
constexpr int kTilePieces = kLoraRows * kPieces;

struct Shared {
  float down[kLoraChain * kLoraPanel];
  float up[kLoraRows * kUpRow];
  uint16_t counts[kTilePieces];
  int warps[kThreads / 32];
  int64_t slot;
};

// `valid` of 8 elements as fp32, the others as zeros.
template <class T>
__device__ __forceinline__ void read_piece(const T* p, int valid, bool aligned, LoraPiece<T>& x) {
  if (aligned && valid == kLoraPiece) {
    constexpr int kLoads = sizeof(x) / 16;
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                   : "l"(reinterpret_cast<const uint4*>(p) + i)
                   : "memory");
    memcpy(&x, words, sizeof x);
    return;
  }
#pragma unroll
  for (int j = 0; j < kLoraPiece; ++j) {
    x.weight[j] = T{};
    if (j < valid) x.weight[j] = p[j];
  }
}

template <class T>
__device__ __forceinline__ void write_piece(T* p, int valid, bool aligned, const LoraPiece<T>& x) {
  if (aligned && valid == kLoraPiece) {
    constexpr int kStores = sizeof(x) / 16;
    uint4 words[kStores];
    memcpy(words, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < kStores; ++i)
      asm volatile(
          "st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(reinterpret_cast<uint4*>(p) + i),
          "r"(words[i].x), "r"(words[i].y), "r"(words[i].z), "r"(words[i].w)
          : "memory");
    return;
  }
#pragma unroll
  for (int j = 0; j < kLoraPiece; ++j)
    if (j < valid) p[j] = x.weight[j];
}

template <class T>
__device__ __forceinline__ void read_floats(int64_t address, int64_t offset, int64_t stride,
                                            int valid, float (&x)[kLoraPiece]) {
  const T* p = reinterpret_cast<const T*>(address);
  const bool aligned = address % 16 == 0 && stride % (16 / sizeof(T)) == 0;
  LoraPiece<T> piece;
  read_piece(p + offset, valid, aligned, piece);
#pragma unroll
  for (int j = 0; j < kLoraPiece; ++j) x[j] = widen(piece.weight[j]);
}

__device__ __forceinline__ void read_factor(int64_t type, int64_t address, int64_t row,
                                            int64_t column, int64_t stride, int64_t valid,
                                            float (&x)[kLoraPiece]) {
  const int count = valid < 0 ? 0 : valid < kLoraPiece ? static_cast<int>(valid) : kLoraPiece;
  const int64_t offset = count ? row * stride + column : 0;
  switch (static_cast<DType>(type)) {
    case DType::f32:
      return read_floats<float>(address, offset, stride, count, x);
    case DType::bf16:
      return read_floats<bf16>(address, offset, stride, count, x);
    case DType::f16:
      return read_floats<f16>(address, offset, stride, count, x);
  }
}

using Rows = float[kRowsEach][kLoraPiece];

// 32 ranks of a factor to shared memory, zeros outside.
__device__ __forceinline__ void load_chain(Shared& shared, const int64_t* part, int64_t first_rank,
                                           int64_t first_row, int64_t first_column,
                                           int64_t columns) {
  const int64_t rank = part[kLoraRank];
#pragma unroll 1
  for (int i = threadIdx.x; i < kLoraChain * kPieces; i += kThreads) {
    const int k = i / kPieces, piece = i % kPieces;
    const int64_t column = first_column + piece * kLoraPiece;
    float x[kLoraPiece];
    read_factor(part[kLoraDownType], part[kLoraDown], first_rank + k, column, part[kLoraDownStride],
                first_rank + k < rank ? columns - column : 0, x);
#pragma unroll
    for (int j = 0; j < kLoraPiece; j += 4)
      *reinterpret_cast<float4*>(
          &shared.down[k * kLoraPanel + lora_down_at(piece * kLoraPiece + j)]) =
          make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
  }
  constexpr int kUpPieces = kLoraChain / kLoraPiece;
#pragma unroll 1
  for (int i = threadIdx.x; i < kLoraRows * kUpPieces; i += kThreads) {
    const int row = i / kUpPieces, k = i % kUpPieces * kLoraPiece;
    const int64_t own = first_row + row - part[kLoraStart];
    const bool inside = own >= 0 && own < part[kLoraPartRows];
    float x[kLoraPiece];
    read_factor(part[kLoraUpType], part[kLoraUp], own, first_rank + k, part[kLoraUpStride],
                inside ? rank - first_rank - k : 0, x);
#pragma unroll
    for (int j = 0; j < kLoraPiece; j += 4)
      *reinterpret_cast<float4*>(&shared.up[row * kUpRow + k + j]) =
          make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
  }
}

// The even or the odd ranks' chains, one step.
__device__ __forceinline__ void chain_step(Rows& chain, const float (&up)[kRowsEach],
                                           const float (&down)[kLoraPiece]) {
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
    for (int j = 0; j < kLoraPiece; ++j) chain[i][j] = lora_fused(up[i], down[j], chain[i][j]);
}

__device__ __forceinline__ void update_of(Shared& shared, const LoraTables& p, int64_t index,
                                          int64_t local, Rows& update) {
  const int64_t* matrix = p.matrices + p.owner[index] * kLoraMatrixColumns;
  const int64_t panels = (matrix[kLoraColumnCount] + kLoraPanel - 1) / kLoraPanel;
  const int64_t block = local / panels, panel = local % panels;
  const int64_t from = matrix[kLoraPartsFrom], to = matrix[kLoraPartsTo];
  int reaching = 0;
#pragma unroll 1
  for (int64_t i = from; i < to; ++i)
    reaching += lora_reaches(p.parts + i * kLoraPartColumns, block);
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
    for (int j = 0; j < kLoraPiece; ++j) update[i][j] = 0.0f;
  bool first = true;
  const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
#pragma unroll 1
  for (int64_t n = from; n < to; ++n) {
    const int64_t* part = p.parts + n * kLoraPartColumns;
    if (!lora_reaches(part, block)) continue;
    Rows sum = {};
#pragma unroll 1
    for (int64_t rank = 0; rank < part[kLoraRank]; rank += kLoraChain) {
      __syncthreads();  // the tables of the last chain are used up
      load_chain(shared, part, rank, block * kLoraRows, panel * kLoraPanel,
                 matrix[kLoraColumnCount]);
      __syncthreads();
      Rows even = {}, odd = {};
      const int64_t left = part[kLoraRank] - rank;
      const int last = left < kLoraChain ? static_cast<int>(left) : static_cast<int>(kLoraChain);
#pragma unroll 1
      for (int k = 0; k < last; k += 4) {
        float up[4][kRowsEach];
#pragma unroll
        for (int i = 0; i < kRowsEach; ++i) {
          const float4 x =
              *reinterpret_cast<const float4*>(&shared.up[(row + i * kRowStep) * kUpRow + k]);
          up[0][i] = x.x, up[1][i] = x.y, up[2][i] = x.z, up[3][i] = x.w;
        }
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
          float down[kLoraPiece];
#pragma unroll
          for (int j = 0; j < kLoraPiece; j += 4) {
            const float4 x = *reinterpret_cast<const float4*>(
                &shared.down[(k + kk) * kLoraPanel + lora_down_at(piece * kLoraPiece + j)]);
            down[j] = x.x, down[j + 1] = x.y, down[j + 2] = x.z, down[j + 3] = x.w;
          }
          chain_step(kk % 2 ? odd : even, up[kk], down);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
        for (int j = 0; j < kLoraPiece; ++j)
          sum[i][j] = lora_sum(sum[i][j], lora_sum(even[i][j], odd[i][j]));
    }
    const float scale = p.scales[n];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < kLoraPiece; ++j)
        update[i][j] = lora_scaled(scale, sum[i][j], update[i][j], reaching == 1, first);
    first = false;
  }
}

__device__ __forceinline__ int sum_of_warp(int x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// How many escapes come before each of this thread's pieces, row by row through the tile; returns those of the tile.
__device__ __forceinline__ int escapes_before(Shared& shared, const uint32_t (&escaped)[kRowsEach],
                                              int (&before)[kRowsEach]) {
  const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i)
    shared.counts[(row + i * kRowStep) * kPieces + piece] =
        static_cast<uint16_t>(__popc(escaped[i]));
  __syncthreads();
  constexpr int kEach = kTilePieces / kThreads;
  int own[kEach], mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = shared.counts[threadIdx.x * kEach + i];
    mine += own[i];
  }
  int up_to = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  if (lane == 31) shared.warps[warp] = up_to;
  __syncthreads();
  int total = 0, at = up_to - mine;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) at += shared.warps[i];
    total += shared.warps[i];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    shared.counts[threadIdx.x * kEach + i] = static_cast<uint16_t>(at);
    at += own[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i)
    before[i] = shared.counts[(row + i * kRowStep) * kPieces + piece];
  return total;
}

__device__ __forceinline__ void add_checksum(uint32_t* sum, uint32_t own) {
  own = static_cast<uint32_t>(sum_of_warp(static_cast<int>(own)));
  if (threadIdx.x % 32 == 0) atomicAdd(sum, own);
}

// A tile and what a thread has of it.
template <class T>
struct Place {
  const int64_t* matrix;
  int64_t block, panel, column, stride;
  T* weight;  // at the thread's first row
  int valid;  // of its 8 columns
  bool aligned;
  int bits, words;  // of a code; a row's words
  uint32_t* codes;  // of the thread's group, at its first row

  __device__ Place(const LoraTables& p, int64_t index, int64_t local)
      : matrix(p.matrices + p.owner[index] * kLoraMatrixColumns) {
    const int64_t columns = matrix[kLoraColumnCount];
    const int64_t panels = (columns + kLoraPanel - 1) / kLoraPanel;
    const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
    block = local / panels;
    panel = local % panels;
    column = panel * kLoraPanel + piece * kLoraPiece;
    stride = matrix[kLoraStride];
    const int64_t first = block * kLoraRows + row, left = columns - column;
    valid = left < 0 ? 0 : left < kLoraPiece ? static_cast<int>(left) : kLoraPiece;
    const int64_t address = matrix[kLoraWeight];
    aligned = address % 16 == 0 && stride % (16 / static_cast<int64_t>(sizeof(T))) == 0;
    weight = reinterpret_cast<T*>(address) + first * stride + column;
    bits = static_cast<int>(matrix[kLoraBitCount]);
    words = static_cast<int>((columns + kLoraGroup - 1) / kLoraGroup) * bits;
    codes = reinterpret_cast<uint32_t*>(matrix[kLoraCodes]) + first * words +
            column / kLoraGroup * bits;
  }

  __device__ bool has_row(int i) const {
    return block * kLoraRows + threadIdx.x / kPieces + i * kRowStep < matrix[kLoraRowCount];
  }
  __device__ T* row(int i) const { return weight + i * kRowStep * stride; }
};

template <class T>
__device__ __forceinline__ void sample_tile(Shared& shared, const LoraTables& p, int64_t index) {
  Rows update;
  update_of(shared, p, index, p.starts[index], update);
  const Place<T> at(p, index, p.starts[index]);
  uint32_t* sums = p.sums + p.owner[index] * kLoraSumColumns;
#pragma unroll 1
  for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits) {
    int escaped = 0;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      if (!at.has_row(i)) continue;
      LoraPiece<T> old;
      read_piece(at.row(i), at.valid, at.aligned, old);
      const auto r = lora_merge_piece(old, update[i], bits, static_cast<uint32_t>(at.column));
      escaped += __popc(r.escaped);
    }
    escaped = sum_of_warp(escaped);
    if (threadIdx.x % 32 == 0)
      atomicAdd(sums + kLoraEscaped2 + bits - kLoraMinBits, static_cast<uint32_t>(escaped));
  }
}

template <class T>
__device__ __forceinline__ void merge_tile(Shared& shared, const LoraTables& p, int64_t index) {
  const int64_t local = index - p.matrices[p.owner[index] * kLoraMatrixColumns + kLoraFirstTile];
  Rows update;
  update_of(shared, p, index, local, update);
  const Place<T> at(p, index, local);
  uint32_t* sums = p.sums + p.owner[index] * kLoraSumColumns;
  LoraPiece<T> merged[kRowsEach];
  uint32_t planes[kRowsEach], escaped[kRowsEach], checksum = 0;
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    planes[i] = escaped[i] = 0;
    if (!at.has_row(i)) continue;
    LoraPiece<T> old;
    read_piece(at.row(i), at.valid, at.aligned, old);
    const auto r = lora_merge_piece(old, update[i], at.bits, static_cast<uint32_t>(at.column));
    merged[i] = r.merged;
    planes[i] = r.planes;
    escaped[i] = r.escaped;
    checksum += r.checksum;
  }
  int before[kRowsEach];
  const int total = escapes_before(shared, escaped, before);
  if (threadIdx.x == 0) {
    const int64_t slot = atomicAdd(sums + kLoraTaken, static_cast<uint32_t>(total));
    const bool fits = slot + total <= at.matrix[kLoraRoom];
    shared.slot = fits ? slot : -1;
    p.starts[index] = shared.slot;
    p.counts[index] = total;
  }
  __syncthreads();
  const int64_t slot = shared.slot;
  if (slot < 0) return;
  add_checksum(sums + kLoraChecksum, checksum);
  T* escapes = reinterpret_cast<T*>(at.matrix[kLoraEscapes]);
  const int quarter = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    // Four threads have the bytes of a group's words; each puts one of the words together.
    uint32_t word = 0;
#pragma unroll
    for (int b = 0; b < kLoraMaxBits; ++b) {
      uint32_t own = (planes[i] >> (8 * b) & 0xffu) << (8 * quarter);
      own |= __shfl_xor_sync(0xffffffffu, own, 1);
      own |= __shfl_xor_sync(0xffffffffu, own, 2);
      if (b == quarter) word = own;
    }
    if (!at.has_row(i)) continue;
    // A group is there if its first piece is; its last pieces may be empty.
    const int64_t group = at.column / kLoraGroup * kLoraGroup;
    if (quarter < at.bits && group < at.matrix[kLoraColumnCount])
      at.codes[static_cast<int64_t>(i) * kRowStep * at.words + quarter] = word;
    // What escapes is read once more: that costs less than to hold all weights until here.
    T* to = escapes + slot + before[i];
#pragma unroll
    for (int j = 0; j < kLoraPiece; ++j)
      if (escaped[i] >> j & 1u) *to++ = at.row(i)[j];
    write_piece(at.row(i), at.valid, at.aligned, merged[i]);
  }
}

template <class T>
__device__ __forceinline__ void unmerge_tile(Shared& shared, const LoraTables& p, int64_t index) {
  const int64_t start = p.starts[index];
  if (start < 0) return;
  const int64_t local = index - p.matrices[p.owner[index] * kLoraMatrixColumns + kLoraFirstTile];
  Rows update;
  update_of(shared, p, index, local, update);
  const Place<T> at(p, index, local);
  LoraPiece<T> old[kRowsEach];
  uint32_t escaped[kRowsEach], checksum = 0;
  const int byte = threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    escaped[i] = 0;
    if (!at.has_row(i) || at.valid == 0) continue;
    LoraPiece<T> merged;
    read_piece(at.row(i), at.valid, at.aligned, merged);
    uint32_t planes = 0;
#pragma unroll
    for (int b = 0; b < kLoraMaxBits; ++b)
      if (b < at.bits)
        planes |= (at.codes[static_cast<int64_t>(i) * kRowStep * at.words + b] >> byte & 0xffu)
                  << (8 * b);
    escaped[i] = lora_piece_escaped(planes, at.bits);
    old[i] = lora_unmerge_piece(merged, update[i], planes, at.bits);
  }
  int before[kRowsEach];
  escapes_before(shared, escaped, before);
  const T* escapes = reinterpret_cast<const T*>(at.matrix[kLoraEscapes]);
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    if (!at.has_row(i) || at.valid == 0) continue;
    int64_t from = start + before[i];
#pragma unroll
    for (int j = 0; j < kLoraPiece; ++j) {
      // A record that is not of these weights must not make this read elsewhere.
      if (escaped[i] >> j & 1u && from < at.matrix[kLoraRoom]) old[i].weight[j] = escapes[from++];
      if (j < at.valid)
        checksum +=
            lora_checksum<T>(lora_bits(old[i].weight[j]), static_cast<uint32_t>(at.column) + j);
    }
    write_piece(at.row(i), at.valid, at.aligned, old[i]);
  }
  add_checksum(p.sums + p.owner[index] * kLoraSumColumns + kLoraChecksum, checksum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) lora_sample_kernel(const LoraTables p) {
  __shared__ Shared shared;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x)
    sample_tile<T>(shared, p, index);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) lora_merge_kernel(const LoraTables p) {
  __shared__ Shared shared;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x)
    merge_tile<T>(shared, p, index);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) lora_unmerge_kernel(const LoraTables p) {
  __shared__ Shared shared;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x)
    unmerge_tile<T>(shared, p, index);
}

// A warp a tile: all bits of a code set is an escape.
__global__ void __launch_bounds__(kThreads) lora_count_kernel(const LoraTables p) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t index = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; index < p.tiles;
       index += warps) {
    const int64_t* matrix = p.matrices + p.owner[index] * kLoraMatrixColumns;
    const int64_t columns = matrix[kLoraColumnCount];
    const int64_t panels = (columns + kLoraPanel - 1) / kLoraPanel;
    const int64_t groups = (columns + kLoraGroup - 1) / kLoraGroup;
    const int64_t local = index - matrix[kLoraFirstTile];
    const int bits = static_cast<int>(matrix[kLoraBitCount]);
    constexpr int kGroups = kLoraPanel / kLoraGroup;
    int count = 0;
    for (int i = lane; i < kLoraRows * kGroups; i += 32) {
      const int64_t row = local / panels * kLoraRows + i / kGroups;
      const int64_t group = local % panels * kGroups + i % kGroups;
      if (row >= matrix[kLoraRowCount] || group >= groups) continue;
      const uint32_t* words =
          reinterpret_cast<const uint32_t*>(matrix[kLoraCodes]) + (row * groups + group) * bits;
      uint32_t mask = ~uint32_t{0};
      for (int b = 0; b < bits; ++b) mask &= words[b];
      count += __popc(mask);
    }
    count = sum_of_warp(count);
    if (lane == 0) p.counts[index] = count;
  }
}

template <class U>
__global__ void __launch_bounds__(kThreads) lora_gather_kernel(const LoraTables p) {
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const int64_t* matrix = p.matrices + p.owner[index] * kLoraMatrixColumns;
    const U* from = reinterpret_cast<const U*>(matrix[kLoraEscapes]) + p.starts[index];
    U* to = reinterpret_cast<U*>(matrix[kLoraGathered]) + p.places[index];
    for (int i = threadIdx.x; i < p.counts[index]; i += kThreads) to[i] = from[i];
  }
}

template <class T>
void launch(const LoraTables& p, unsigned grid, cudaStream_t stream) {
  switch (p.mode) {
    case LoraMode::sample:
      return lora_sample_kernel<T><<<grid, kThreads, 0, stream>>>(p);
    case LoraMode::merge:
      return lora_merge_kernel<T><<<grid, kThreads, 0, stream>>>(p);
    case LoraMode::unmerge:
      return lora_unmerge_kernel<T><<<grid, kThreads, 0, stream>>>(p);
    case LoraMode::count:
      return lora_count_kernel<<<grid, kThreads, 0, stream>>>(p);
    case LoraMode::gather:
      return lora_gather_kernel<LoraBits<T>><<<grid, kThreads, 0, stream>>>(p);
  }
}

}  // namespace

void lora_pass_cuda(int64_t mode, ScalarType dtype, const Tensor& matrices, const Tensor& parts,
                    const Tensor& scales, const Tensor& owner, Tensor starts, Tensor counts,
                    const Tensor& places, Tensor sums) {
  const int32_t device = owner.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const LoraTables p =
      bind_lora_tables(mode, matrices, parts, scales, owner, starts, counts, places, sums);
  if (p.tiles == 0) return;
  int processors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) fail(kLoraMerge, "no device: ", cudaGetErrorString(error));
  const unsigned grid = lora_grid(p.tiles, processors);
  const cudaStream_t stream = current_stream(kLoraMerge, device);
  switch (dtype_of(kLoraMerge, "a weight", dtype)) {
    case DType::f32:
      launch<float>(p, grid, stream);
      break;
    case DType::bf16:
      launch<bf16>(p, grid, stream);
      break;
    case DType::f16:
      launch<f16>(p, grid, stream);
      break;
  }
  check_launch(kLoraMerge);
}

}  // namespace sgld
