// The reader of weights against plain arithmetic: every pair of precisions on every ISA this machine has, odd sizes
// and places, several files and threads, cached and not, and files that end too early. Run by ctest; needs no torch.
#include "sgld/weights.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "sgld/vec.h"

namespace {

using namespace sgld;
using Bytes = std::vector<unsigned char>;

std::mt19937_64 random_bits(7);

Bytes random_bytes(int64_t n) {
  Bytes bytes(n);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random_bits());
  return bytes;
}

// A file that is gone when the test is.
class File {
 public:
  explicit File(const Bytes& bytes) {
    char name[] = "/tmp/sgld_weights_XXXXXX";
    file_.buffered = mkstemp(name);
    expect(file_.buffered >= 0, "a temporary file");
    size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t count = write(file_.buffered, bytes.data() + done, bytes.size() - done);
      if (count <= 0) break;
      done += count;
    }
    expect(done == bytes.size() && fsync(file_.buffered) == 0, "the file was written");
    file_.direct = open(name, O_RDONLY | O_DIRECT);
    unlink(name);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    close(file_.buffered);
    if (file_.direct >= 0) close(file_.direct);
  }
  void forget() const { posix_fadvise(file_.buffered, 0, 0, POSIX_FADV_DONTNEED); }
  WeightFile file() const { return file_; }

 private:
  WeightFile file_;
};

// Bytes in pieces of odd sizes that touch each other, some of them longer than a window.
void raw(int threads, bool cached, bool direct) {
  const std::string what = std::to_string(threads) + " threads, " + (cached ? "" : "not ") +
                           "cached, " + (direct ? "" : "not ") + "direct";
  const std::vector<int64_t> sizes = {
      0, 1, 7, kWeightPage, kWeightWindow + 13, 3, 1 << 20, 2 * kWeightWindow, 99};
  const int64_t first = 123, gap = 5001;
  int64_t total = first;
  for (const int64_t size : sizes) total += size + gap;
  const Bytes stored[] = {random_bytes(total), random_bytes(total)};
  const File one(stored[0]), two(stored[1]);
  std::vector<WeightFile> files = {one.file(), two.file()};
  if (!direct)
    for (WeightFile& file : files) file.direct = -1;
  if (!cached) one.forget(), two.forget();
  std::vector<Bytes> found;
  std::vector<WeightPiece> pieces;
  found.reserve(2 * sizes.size());
  for (int file = 0; file < 2; ++file) {
    int64_t begin = first;
    for (size_t i = 0; i < sizes.size(); ++i) {
      found.emplace_back(sizes[i]);
      WeightPiece piece;
      piece.file = file, piece.begin = begin, piece.count = sizes[i];
      piece.target = found.back().data();
      pieces.push_back(piece);
      begin += sizes[i] + (i % 2 ? gap : 0);
    }
  }
  expect(read_weights(files, pieces, threads).piece == -1, what + ": everything can be read");
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto begin = stored[pieces[i].file].begin() + pieces[i].begin;
    expect(found[i] == Bytes(begin, begin + pieces[i].count),
           what + ": piece " + std::to_string(i));
  }
}

template <class T>
Bytes bits_of(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// Numbers of every size of exponent, with infinities and zeros of both signs.
template <class From, class To, class Widen>
void numbers(Number from, DType to, Widen value_of, int64_t begin, const char* what) {
  const int64_t count = kWeightWindow / static_cast<int64_t>(sizeof(From)) + 1001;
  std::vector<From> stored(count);
  for (From& value : stored) {
    do {
      const uint64_t bits = random_bits();
      std::memcpy(&value, &bits, sizeof value);
    } while (std::isnan(value_of(value)));
  }
  Bytes bytes = random_bytes(begin);
  const Bytes tail = bits_of(stored);
  bytes.insert(bytes.end(), tail.begin(), tail.end());
  const File file(bytes);
  std::vector<To> wanted(count);
  for (int64_t i = 0; i < count; ++i) narrow(static_cast<float>(value_of(stored[i])), &wanted[i]);
  for (const bool cached : {true, false})
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
      if (isa > machine_isa()) continue;
      cap_isa(isa);
      if (!cached) file.forget();
      std::vector<To> found(count);
      WeightPiece piece;
      piece.begin = begin, piece.count = count, piece.from = from, piece.to = to;
      piece.target = found.data();
      const WeightFailure failure = read_weights({file.file()}, {piece}, 3);
      const std::string where = std::string(what) + " at " + std::to_string(begin) + ", " +
                                isa_name(isa) + (cached ? ", cached" : "");
      expect(failure.piece == -1, where + " can be read");
      expect(bits_of(found) == bits_of(wanted), where + " are the numbers stored");
    }
  cap_isa(Isa::amx_bf16);
}

template <class From, class Widen>
void from(Number number, Widen value_of, int64_t begin, const std::string& what) {
  numbers<From, float>(number, DType::f32, value_of, begin, (what + " to f32").c_str());
  numbers<From, bf16>(number, DType::bf16, value_of, begin, (what + " to bf16").c_str());
  numbers<From, f16>(number, DType::f16, value_of, begin, (what + " to f16").c_str());
}

void failures_are_told() {
  const Bytes bytes = random_bytes(3 * kWeightWindow + 10);
  const File file(bytes);
  Bytes found(kWeightWindow + 100);
  WeightPiece whole, beyond, far;
  whole.count = 10, whole.target = found.data();
  beyond.begin = 2 * kWeightWindow + 50, beyond.count = kWeightWindow, beyond.target = whole.target;
  far.begin = 9 * kWeightWindow, far.count = 1, far.target = whole.target;
  for (const bool cached : {true, false}) {
    if (!cached) file.forget();
    for (const WeightPiece& piece : {beyond, far}) {
      const WeightFailure failure = read_weights({file.file()}, {whole, piece}, 2);
      expect(failure.piece == 1 && failure.error == 0, "a file that ends too early");
    }
  }
  const WeightFailure failure = read_weights({{-1, -1}}, {whole}, 2);
  expect(failure.piece == 0 && failure.error == EBADF, "a descriptor that is none");
  expect(read_weights({}, {}, 4).piece == -1, "nothing to read");
}

}  // namespace

int main() {
  for (const int threads : {1, 4})
    for (const bool cached : {true, false})
      for (const bool direct : {true, false}) raw(threads, cached, direct);
  const auto same = [](auto value) { return value; };
  const auto wide = [](auto value) { return widen(value); };
  for (const int64_t begin : {8, 4099}) {
    from<double>(Number::f64, same, begin, "f64");
    from<float>(Number::f32, same, begin, "f32");
    from<bf16>(Number::bf16, wide, begin, "bf16");
    from<f16>(Number::f16, wide, begin, "f16");
  }
  failures_are_told();
  if (!failures) std::puts("weights: ok");
  return failures != 0;
}
