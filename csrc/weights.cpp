// A file is cut into windows, and each thread takes the next one. A window whose pages are in the cache is copied
// from there straight into the targets; any other is read past the cache into the scratch of its thread, since targets
// and file are hardly ever aligned alike, and from there into the targets while other threads read. Fresh memory comes
// in pages of 4 KiB: asking for large ones made the kernel take four times as long over it.
#include "sgld/weights.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <system_error>
#include <thread>
#include <utility>

namespace sgld {
namespace {

int64_t down(int64_t value, int64_t unit) { return value / unit * unit; }
int64_t up(int64_t value, int64_t unit) { return down(value + unit - 1, unit); }

// A part of a piece: whole numbers that begin within one window.
struct Segment {
  int64_t piece;
  int64_t begin;
  int64_t bytes;
  char* target;
};

// The segments of one window of one file.
struct Window {
  int64_t file;
  size_t first;
  size_t last;
};

struct Plan {
  std::vector<Segment> segments;
  std::vector<Window> windows;
};

Plan plan(const std::vector<WeightPiece>& pieces) {
  std::vector<int64_t> order(pieces.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const WeightPiece &x = pieces[a], &y = pieces[b];
    return x.file != y.file ? x.file < y.file : x.begin < y.begin;
  });
  Plan made;
  int64_t file = -1, window = -1;
  for (const int64_t index : order) {
    const WeightPiece& piece = pieces[index];
    const int64_t size = size_of(piece.from);
    const int64_t wide = piece.from == Number::bytes ? 1 : size_of(piece.to);
    int64_t begin = piece.begin, left = piece.count;
    char* target = static_cast<char*>(piece.target);
    while (left > 0) {
      const int64_t at = begin / kWeightWindow;
      if (piece.file != file || at != window) {
        file = piece.file, window = at;
        made.windows.push_back({file, made.segments.size(), made.segments.size()});
      }
      const int64_t room = ((at + 1) * kWeightWindow - begin) / size;
      const int64_t count = std::min(left, std::max<int64_t>(room, 1));
      made.segments.push_back({index, begin, count * size, target});
      made.windows.back().last = made.segments.size();
      begin += count * size, target += count * wide, left -= count;
    }
  }
  return made;
}

// Which pages of a file are in the cache. The mapping is only asked about, never read.
class Cache {
 public:
  explicit Cache(const WeightFile& file) {
    struct stat status;
    if (file.direct < 0 || fstat(file.buffered, &status) != 0 || status.st_size == 0) return;
    size_ = status.st_size;
    void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.buffered, 0);
    if (mapped != MAP_FAILED) mapped_ = static_cast<char*>(mapped);
  }
  Cache(Cache&& other) noexcept
      : mapped_(std::exchange(other.mapped_, nullptr)), size_(other.size_) {}
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache() {
    if (mapped_) munmap(mapped_, size_);
  }

  // Whether most of a range is there; also where nobody knows, since a plain read is always right.
  bool holds(int64_t begin, int64_t end) const {
    const int64_t page = sysconf(_SC_PAGESIZE);
    begin = down(begin, page), end = std::min(end, size_);
    if (!mapped_ || begin >= end) return true;
    std::vector<unsigned char> there((end - begin + page - 1) / page);
    if (mincore(mapped_ + begin, end - begin, there.data()) != 0) return true;
    const int64_t count =
        std::count_if(there.begin(), there.end(), [](unsigned char c) { return c & 1; });
    return 2 * count >= static_cast<int64_t>(there.size());
  }

 private:
  char* mapped_ = nullptr;
  int64_t size_ = 0;
};

// Bytes that were read, fewer than asked for only at the end of the file; or -errno.
int64_t read_all(int fd, char* to, int64_t bytes, int64_t begin, bool direct) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t count = pread(fd, to + done, bytes - done, begin + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -errno;
    if (count == 0) break;
    done += count;
    // Past the cache only whole blocks can be asked for, and what is no whole one was the end.
    if (direct && done % kWeightPage != 0) break;
  }
  return done;
}

class Reader {
 public:
  Reader(const std::vector<WeightFile>& files, const std::vector<WeightPiece>& pieces)
      : files_(files), pieces_(pieces), plan_(plan(pieces)), direct_(files.size()) {
    for (size_t i = 0; i < files.size(); ++i) {
      caches_.emplace_back(files[i]);
      direct_[i] = files[i].direct >= 0;
    }
  }

  WeightFailure run(int threads) {
    const int64_t most = static_cast<int64_t>(plan_.windows.size());
    std::vector<std::thread> others;
    try {
      for (int64_t i = 1; i < std::min<int64_t>(threads, most); ++i)
        others.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      // As many as the system gives: the one that is here reads as well.
    }
    work();
    for (std::thread& other : others) other.join();
    return failure_;
  }

 private:
  struct Free {
    void operator()(char* pointer) const { std::free(pointer); }
  };
  using Scratch = std::unique_ptr<char, Free>;

  void work() {
    Scratch scratch(static_cast<char*>(std::aligned_alloc(kWeightPage, kWeightScratch)));
    for (size_t i = next_++; i < plan_.windows.size() && !failed_; i = next_++) {
      const Window& window = plan_.windows[i];
      if (!scratch)
        fail(plan_.segments[window.first], ENOMEM);
      else if (!read_direct(window, scratch.get()))
        read_buffered(window, scratch.get());
    }
  }

  // False where the window should be, or has to be, read through the cache.
  bool read_direct(const Window& window, char* scratch) {
    const WeightFile& file = files_[window.file];
    int64_t end = 0;
    for (size_t i = window.first; i < window.last; ++i)
      end = std::max(end, plan_.segments[i].begin + plan_.segments[i].bytes);
    const int64_t begin = down(plan_.segments[window.first].begin, kWeightPage);
    if (!direct_[window.file] || caches_[window.file].holds(begin, end)) return false;
    const int64_t got = read_all(file.direct, scratch, up(end, kWeightPage) - begin, begin, true);
    if (got == -EINVAL || got == -EOPNOTSUPP) {  // it asks for larger blocks, or does not after all
      direct_[window.file] = false;
      return false;
    }
    for (size_t i = window.first; i < window.last; ++i) {
      const Segment& segment = plan_.segments[i];
      const int64_t offset = segment.begin - begin;
      if (got < offset + segment.bytes) {
        fail(segment, got < 0 ? static_cast<int>(-got) : 0);
        break;
      }
      put(segment, scratch + offset);
    }
    return true;
  }

  void read_buffered(const Window& window, char* scratch) {
    const int fd = files_[window.file].buffered;
    for (size_t i = window.first; i < window.last; ++i) {
      const Segment& segment = plan_.segments[i];
      const bool plain = pieces_[segment.piece].from == Number::bytes;
      char* to = plain ? segment.target : scratch;
      const int64_t got = read_all(fd, to, segment.bytes, segment.begin, false);
      if (got < segment.bytes) return fail(segment, got < 0 ? static_cast<int>(-got) : 0);
      if (!plain) put(segment, scratch);
    }
  }

  void put(const Segment& segment, char* bytes) const {
    const WeightPiece& piece = pieces_[segment.piece];
    const int64_t size = size_of(piece.from);
    const Convert convert = converter(isa_, piece.from, piece.to);
    if (!convert) {
      std::memcpy(segment.target, bytes, segment.bytes);
      return;
    }
    // A file need not align its numbers. What is written over here was put before.
    char* aligned = bytes - reinterpret_cast<uintptr_t>(bytes) % size;
    if (aligned != bytes) std::memmove(aligned, bytes, segment.bytes);
    convert(aligned, segment.target, segment.bytes / size);
  }

  void fail(const Segment& segment, int error) {
    if (!failed_.exchange(true)) failure_ = {segment.piece, error};
  }

  const std::vector<WeightFile>& files_;
  const std::vector<WeightPiece>& pieces_;
  const Plan plan_;
  const Isa isa_ = active_isa();
  std::vector<Cache> caches_;
  std::vector<std::atomic<bool>> direct_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  WeightFailure failure_;
};

}  // namespace

WeightFailure read_weights(const std::vector<WeightFile>& files,
                           const std::vector<WeightPiece>& pieces, int threads) {
  return Reader(files, pieces).run(threads);
}

}  // namespace sgld
