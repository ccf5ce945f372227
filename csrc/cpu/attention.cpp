#include "sgld/attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention_kernel.h"
#include "attention_ops.h"
#include "sgld/isa.h"
#include "torch_view.h"

namespace sgld {
namespace {

// Heads are packed and attended in groups: packed keys and values of a group take about this much.
constexpr int64_t kGroupBytes = 16 << 20;
// Memory above this size is given back after a call.
constexpr int64_t kKeptBytes = 64 << 20;
// Keys packed at a time by one thread.
constexpr int64_t kPackKeys = 512;
// Pieces of work a thread should have, so that a slow one does not hold up the others.
constexpr int64_t kPieces = 4;
// Elements of a merge that are worth waking a thread for.
constexpr int64_t kMergeGrain = 32768;

const AttentionKernels& kernels_for(DType dtype) {
#if defined(SGLD_X86)
  const Isa isa = active_isa();
  if (dtype == DType::bf16 && active_amx()) return attention_amx();
  if (dtype == DType::bf16 && active_pairs()) return attention_avx512_bf16();
  if (isa >= Isa::avx512) return attention_avx512();
  if (isa == Isa::avx2) return attention_avx2();
#endif
  (void)dtype;
  return attention_scalar();
}

// Memory of the calling thread that its next call finds again, so that it is not paged in anew.
class Workspace {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = whole(bytes, kAlign);
      memory_.reset(static_cast<char*>(::operator new(size_, std::align_val_t(kAlign))));
    }
    return memory_.get();
  }
  void shrink() {
    if (size_ <= kKeptBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kAlign = 4096;
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(kAlign)); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

// Runs job(i, thread) for every i below n; threads take the next one when they are done.
template <class Job>
void share(int64_t n, int64_t threads, const Job& job) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < n; i = next++) job(i, thread);
  });
}

struct Head {
  const Sequence* sequence;
  int64_t head;
  int64_t packed;  // offset
};

// Keys [first, last) to pack or queries [first, last) to attend with.
struct Piece {
  const Head* head;
  int64_t first, last;
};

void cut(std::vector<Piece>& pieces, const Head& head, int64_t n, int64_t step) {
  for (int64_t first = 0; first < n; first += step)
    pieces.push_back({&head, first, std::min(n, first + step)});
}

void attend(const Attention& p, const std::vector<Sequence>& sequences) {
  const AttentionKernels& kernels = kernels_for(p.dtype);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t scratch = whole(kernels.scratch_bytes(p.d), 4096);
  std::vector<Head> heads;
  for (const Sequence& sequence : sequences)
    for (int64_t head = 0; sequence.S > 0 && head < p.H; ++head)
      heads.push_back({&sequence, head, 0});

  thread_local Workspace workspace;
  std::vector<Piece> pack, work;
  for (size_t begin = 0, end = 0; begin < heads.size(); begin = end) {
    int64_t bytes = 0, rows = 0;
    do {
      heads[end].packed = bytes;
      rows += heads[end].sequence->S;
      bytes += whole(kernels.packed_bytes(p.d, heads[end].sequence->L), 4096);
    } while (++end < heads.size() && bytes < kGroupBytes);
    // More rows at a time read the keys less often, but every thread needs some.
    int64_t step = kernels.query_rows;
    while (step > kernels.strip && rows < step * kPieces * threads)
      step = whole(step / 2, kernels.strip);
    pack.clear();
    work.clear();
    for (size_t i = begin; i < end; ++i) {
      cut(pack, heads[i], heads[i].sequence->L, kPackKeys);
      cut(work, heads[i], heads[i].sequence->S, step);
    }
    char* const packed = workspace.at_least(bytes + threads * scratch);
    share(static_cast<int64_t>(pack.size()), threads, [&](int64_t i, int64_t) {
      const Piece& piece = pack[i];
      kernels.pack(p, *piece.head->sequence, piece.head->head, piece.first, piece.last,
                   packed + piece.head->packed);
    });
    share(static_cast<int64_t>(work.size()), threads, [&](int64_t i, int64_t thread) {
      const Piece& piece = work[i];
      kernels.attend(p, *piece.head->sequence, piece.head->head, piece.first, piece.last,
                     packed + piece.head->packed, packed + bytes + thread * scratch);
    });
  }
  workspace.shrink();
}

Tensor dense_heads(const Tensor& tensor) {
  const int64_t n = tensor.dim();
  const bool dense = n == 0 || tensor.size(n - 1) <= 1 || tensor.stride(n - 1) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

std::vector<int64_t> lengths_of(const char* name, const Tensor& any) {
  if (any.is_cuda() || any.dim() != 1) fail(kAttention, name, " must be one row on the CPU");
  const Tensor tensor = torch::stable::contiguous(any);
  const int64_t n = tensor.size(0);
  if (tensor.scalar_type() == ScalarType::Int) {
    const int32_t* data = static_cast<const int32_t*>(tensor.const_data_ptr());
    return {data, data + n};
  }
  if (tensor.scalar_type() != ScalarType::Long) fail(kAttention, name, " must be int32 or int64");
  const int64_t* data = static_cast<const int64_t*>(tensor.const_data_ptr());
  return {data, data + n};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q_any, const Tensor& k_any,
                                         const Tensor& v_any, double scale, bool lse,
                                         const std::optional<Tensor>& cu_seqlens_q,
                                         const std::optional<Tensor>& cu_seqlens_k) {
  const Tensor q = dense_heads(q_any), k = dense_heads(k_any), v = dense_heads(v_any);
  const bool packed = cu_seqlens_q.has_value();
  if (packed != cu_seqlens_k.has_value())
    fail(kAttention, "cu_seqlens_q and cu_seqlens_k come together");
  Attention p = bind_attention(view_of(kAttention, "q", q), view_of(kAttention, "k", k),
                               view_of(kAttention, "v", v), scale, packed);
  const std::vector<Sequence> sequences =
      packed ? packed_sequences(p, lengths_of("cu_seqlens_q", *cu_seqlens_q),
                                lengths_of("cu_seqlens_k", *cu_seqlens_k))
             : dense_sequences(p);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  const std::vector<int64_t> sums = !lse     ? std::vector<int64_t>{0}
                                    : packed ? std::vector<int64_t>{p.H, p.S}
                                             : std::vector<int64_t>{p.B, p.H, p.S};
  Tensor lse_out = torch::stable::new_empty(q, sums, ScalarType::Float);
  if (out.numel() == 0) return {out, lse_out};
  p.out = out.mutable_data_ptr();
  p.lse = lse ? static_cast<float*>(lse_out.mutable_data_ptr()) : nullptr;
  attend(p, sequences);
  return {out, lse_out};
}

std::tuple<Tensor, Tensor> attention_merge_cpu(const Tensor& out_a, const Tensor& lse_a,
                                               const Tensor& out_b, const Tensor& lse_b) {
  constexpr const char* op = kAttentionMerge;
  const auto dense = [](const Tensor& x) { return torch::stable::contiguous(x); };
  const Tensor a = dense(out_a), x = dense(lse_a), b = dense(out_b), y = dense(lse_b);
  AttentionMerge p = bind_attention_merge(view_of(op, "out_a", a), view_of(op, "lse_a", x),
                                          view_of(op, "out_b", b), view_of(op, "lse_b", y));
  Tensor out = torch::stable::new_empty(a, a.sizes());
  Tensor lse = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return {out, lse};
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  auto rows = attention_merge_rows_scalar;
#if defined(SGLD_X86)
  if (active_isa() >= Isa::avx512)
    rows = attention_merge_rows_avx512;
  else if (active_isa() == Isa::avx2)
    rows = attention_merge_rows_avx2;
#endif
  const int64_t grain = std::max<int64_t>(1, kMergeGrain / p.d);
  torch::stable::parallel_for(0, p.B * p.S * p.H, grain,
                              [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return {out, lse};
}

}  // namespace sgld
