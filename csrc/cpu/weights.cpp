// The reader of weights on torch tensors.
#include "sgld/weights.h"

#include "sgld/check.h"
#include "torch_view.h"
#include "weights_ops.h"

namespace sgld {
namespace {

constexpr const char* kOp = "read_weights";

void check_length(const char* name, size_t length, const char* of, size_t want) {
  if (length != want) fail(kOp, "there are ", length, " ", name, " for ", want, " ", of);
}

}  // namespace

std::vector<int64_t> read_weights_cpu(const std::vector<Tensor>& targets,
                                      const std::vector<int64_t>& buffered,
                                      const std::vector<int64_t>& direct,
                                      const std::vector<int64_t>& files,
                                      const std::vector<int64_t>& begins,
                                      const std::vector<int64_t>& numbers, int64_t threads) {
  check_length("direct descriptors", direct.size(), "files", buffered.size());
  check_length("files", files.size(), "targets", targets.size());
  check_length("begins", begins.size(), "targets", targets.size());
  check_length("numbers", numbers.size(), "targets", targets.size());
  if (threads < 1) fail(kOp, "threads must be at least 1");
  std::vector<WeightFile> opened;
  for (size_t i = 0; i < buffered.size(); ++i)
    opened.push_back({static_cast<int>(buffered[i]), static_cast<int>(direct[i])});
  std::vector<WeightPiece> pieces;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor& target = targets[i];
    if (target.is_cuda()) fail(kOp, "a target is not on the CPU");
    if (!target.is_contiguous()) fail(kOp, "a target is not contiguous");
    if (files[i] < 0 || files[i] >= static_cast<int64_t>(opened.size()))
      fail(kOp, "there is no file ", files[i]);
    if (begins[i] < 0) fail(kOp, "a target begins before its file");
    if (numbers[i] < 0 || numbers[i] > static_cast<int64_t>(Number::f16))
      fail(kOp, "there is no number type ", numbers[i]);
    WeightPiece piece;
    piece.file = files[i];
    piece.begin = begins[i];
    piece.from = static_cast<Number>(numbers[i]);
    piece.count = target.numel();
    if (piece.from == Number::bytes)
      piece.count *= target.element_size();
    else
      piece.to = dtype_of(kOp, "a target", target.scalar_type());
    piece.target = target.mutable_data_ptr();
    pieces.push_back(piece);
  }
  const WeightFailure failure = read_weights(opened, pieces, static_cast<int>(threads));
  if (failure.piece < 0) return {};
  return {failure.piece, failure.error};
}

}  // namespace sgld
