// Attention on the tile unit of Intel's server CPUs, where a product of 16x32 by 32x16 bf16 is one instruction.
//
// The products are transposed: scoresᵀ = k qᵀ and resultᵀ = vᵀ probsᵀ. A lane of a vector is then a query, so that
// maximum, sum and rescaling of the softmax never cross lanes. And tiles are multiplied beside the vector units: while
// one unit of work (a strip of queries against a block of keys) is softened, a few rows between every two products, the
// scores of the next unit and the result of the last one are computed.
#include "attention_bf16.h"

namespace sgld {
namespace {

using V = Avx512<true>;

constexpr int64_t kSide = 32;  // queries of a strip; keys or dims of a panel; depth of one product
constexpr int64_t kTile = 16 * 32;
constexpr int64_t kKeys = 1024, kQueries = 256;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The compiler does not know what memory the tile instructions read and write.
inline void settle() { asm volatile("" : : : "memory"); }

// Eight tiles of 16 rows of 64 bytes; a state of this thread.
struct TileUnit {
  TileUnit() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileUnit() { _tile_release(); }
};

// c [32, 32] = or += a b: a panel of 32 rows in tiles, b [depth / 2][32 columns][2]. Calls `between` after every step.
template <class Between>
inline void multiply(const bf16* a, const bf16* b, int64_t depth, float* c, bool add,
                     const Between& between) {
  constexpr int64_t row = kSide * 4;
  settle();
  if (add) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + 16, row);
    _tile_loadd(2, c + kTile, row);
    _tile_loadd(3, c + kTile + 16, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kSide, a += 2 * kTile, b += kSide * kSide) {
    _tile_loadd(6, b, row);
    _tile_loadd(4, a, 64);
    _tile_loadd(7, b + 32, row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    between();
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c + 16, row);
  _tile_stored(2, c + kTile, row);
  _tile_stored(3, c + kTile + 16, row);
  settle();
}

// Keys and values as panels of 32 rows: [panel][depth / 32][2 tiles][16 rows][32].
struct Layout {
  int64_t width, keys;  // d and L, padded
  explicit Layout(int64_t d, int64_t L = 0) : width(whole(d, kSide)), keys(whole(L, kSide)) {}
};

int64_t packed_bytes(int64_t d, int64_t L) {
  const Layout at(d, L);
  return 2 * at.keys * at.width * static_cast<int64_t>(sizeof(bf16));
}

inline __mmask32 first_of_32(int64_t n) {
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1;
}

void pack(const Attention& p, const Sequence& s, int64_t head, int64_t first, int64_t last,
          void* packed) {
  const Layout at(p.d, s.L);
  bf16* keys = static_cast<bf16*>(packed);
  bf16* values = keys + at.keys * at.width;
  const bf16* k = static_cast<const bf16*>(p.k.data) + s.k + head * p.k.head;
  const bf16* v = static_cast<const bf16*>(p.v.data) + s.v + head * p.v.head;
  for (int64_t i = first; i < whole(last, kSide); i += kSide)
    for (int64_t c = 0; c < at.width; c += kSide) {
      const __mmask32 there = first_of_32(p.d - c);
      bf16* out = keys + i * at.width + c * kSide;
      for (int64_t r = 0; r < kSide; ++r) {
        const __mmask32 mask = i + r < last ? there : 0;
        _mm512_storeu_si512(out + r * 32,
                            _mm512_maskz_loadu_epi16(mask, k + (i + r) * p.k.token + c));
      }
      // 32 keys of 32 dims become 32 dims of 32 keys: pairs of keys, then 16 columns of pairs.
      out = values + c * at.keys + i * kSide;
      for (int64_t half = 0; half < 2; ++half) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          const __mmask16 dims = static_cast<__mmask16>(there >> (16 * half));
          const int64_t key = i + 2 * r;
          const bf16* row = v + key * p.v.token + c + half * 16;
          x[r] = Bf16Pairs::interleave(
              _mm256_maskz_loadu_epi16(key < last ? dims : 0, row),
              _mm256_maskz_loadu_epi16(key + 1 < last ? dims : 0, row + p.v.token));
        }
        Bf16Pairs::transpose(x);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + half * kTile + r * 32, x[r]);
      }
    }
}

// What a call of attend works in. Two units are under way at a time.
struct Scratch {
  bf16* q;          // [strip][width / 2][32][2]
  float* sum;       // [strip][width][32]: the result before its division
  float* high;      // [strip][32], in powers of 2, already times the scale
  float* total;     // [strip][32]
  float* score[2];  // [key][32]
  bf16* prob[2];    // [key / 2][32][2]
  char* end;

  Scratch(void* memory, int64_t width) {
    char* next = static_cast<char*>(memory);
    const auto take = [&next](auto** part, int64_t n) {
      using Part = std::remove_reference_t<decltype(**part)>;
      *part = reinterpret_cast<Part*>(next);
      next += n * static_cast<int64_t>(sizeof(Part));
    };
    take(&q, kQueries * width);
    take(&sum, kQueries * width);
    take(&high, kQueries);
    take(&total, kQueries);
    for (int i = 0; i < 2; ++i) {
      take(&score[i], kKeys * kSide);
      take(&prob[i], kKeys * kSide);
    }
    end = next;
  }
};

int64_t scratch_bytes(int64_t d) {
  return Scratch(nullptr, Layout(d).width).end - static_cast<char*>(nullptr);
}

// A strip of queries against a block of keys.
struct Unit {
  const bf16* q;
  const bf16* keys;
  const bf16* values;
  float *score, *sum, *high, *total;
  bf16* prob;
  float most[kSide];  // largest scores
  int64_t n, padded;  // keys
  bool begin;         // the strip's first
};

struct Work {
  const Scratch& at;
  const bf16* keys;
  const bf16* values;
  int64_t width, padded_keys;
  int64_t strips, L;
  float factor;

  int64_t units() const { return (L + kKeys - 1) / kKeys * strips; }
  int64_t steps_of(const Unit& unit) const { return unit.padded / kSide * (width / kSide); }

  void open(int64_t index, Unit& unit) const {
    const int64_t strip = index % strips, first = index / strips * kKeys;
    unit.q = at.q + strip * kSide * width;
    unit.keys = keys + first * width;
    unit.values = values + first * kSide;
    unit.sum = at.sum + strip * kSide * width;
    unit.high = at.high + strip * kSide;
    unit.total = at.total + strip * kSide;
    unit.score = at.score[index % 2];
    unit.prob = at.prob[index % 2];
    unit.n = L - first < kKeys ? L - first : kKeys;
    unit.padded = whole(unit.n, kSide);
    unit.begin = first == 0;
  }

  template <class Between>
  void multiply_keys(Unit& unit, const Between& between) const {
    V most[2] = {V::set(kLowest), V::set(kLowest)};
    const auto see = [&](const float* from) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSide * kSide; i += kSide) {
        most[0] = larger(most[0], V::load(from + i));
        most[1] = larger(most[1], V::load(from + i + 16));
      }
    };
    for (int64_t i = 0; i < unit.padded; i += kSide) {
      multiply(unit.keys + i * width, unit.q, width, unit.score + i * kSide, false, between);
      if (i > 0) see(unit.score + (i - kSide) * kSide);
    }
    for (int64_t i = unit.n * kSide; i < unit.padded * kSide; i += 16)
      V::set(kLowest).store(unit.score + i);
    see(unit.score + (unit.padded - kSide) * kSide);
    most[0].store(unit.most);
    most[1].store(unit.most + 16);
  }

  template <class Between>
  void multiply_values(const Unit& unit, const Between& between) const {
    for (int64_t i = 0; i < width; i += kSide)
      multiply(unit.values + i * padded_keys, unit.prob, unit.padded, unit.sum + i * kSide,
               !unit.begin, between);
  }

  // Before softening: the running maximum of the strip follows the largest new score where it must.
  void follow(const Unit& unit) const {
    V old[2], next[2];
    __mmask16 far = 0;
    for (int g = 0; g < 2; ++g) {
      next[g] = V::load(unit.most + 16 * g) * V::set(factor);
      if (unit.begin) {
        next[g].store(unit.high + 16 * g);
        V::set(0.0f).store(unit.total + 16 * g);
      } else {
        old[g] = V::load(unit.high + 16 * g);
        far |= _mm512_cmp_ps_mask(next[g].v, old[g].v, _CMP_GT_OQ);
      }
    }
    if (!far) return;
    V fade[2];
    for (int g = 0; g < 2; ++g) {
      next[g] = larger(next[g], old[g]);
      fade[g] = exp2_of<false>(old[g] - next[g]);
      next[g].store(unit.high + 16 * g);
      (V::load(unit.total + 16 * g) * fade[g]).store(unit.total + 16 * g);
    }
    for (int64_t i = 0; i < width * kSide; i += kSide)
      for (int g = 0; g < 2; ++g) {
        float* sum = unit.sum + i + 16 * g;
        (V::load(sum) * fade[g]).store(sum);
      }
  }

  static constexpr int64_t kChunk = 8;  // keys softened at a time

  void soften(const Unit& unit, int64_t key) const {
    const V f = V::set(factor);
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      const float* score = unit.score + key * kSide + 16 * g;
      bf16* prob = unit.prob + key * kSide + 32 * g;
      float* total = unit.total + 16 * g;
      const V high = V::load(unit.high + 16 * g);
      V added = V::set(0.0f);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kChunk * kSide; i += 2 * kSide) {
        const V even = exp2_of<true>(V{_mm512_fmsub_ps(V::load(score + i).v, f.v, high.v)});
        const V odd = exp2_of<true>(V{_mm512_fmsub_ps(V::load(score + i + kSide).v, f.v, high.v)});
        added = added + (even + odd);
        Bf16Pairs::put_pairs(even, odd, prob + i);
      }
      (V::load(total) + added).store(total);
    }
  }

  void run() const {
    const auto nothing = [] {};
    const int64_t count = units();
    if (count == 0) return;
    Unit three[3];
    open(0, three[0]);
    multiply_keys(three[0], nothing);
    // The last unit's result belongs to the same strip if there is only one: it must be complete before it is rescaled.
    const bool alone = strips == 1;
    for (int64_t index = 0; index < count; ++index) {
      Unit &last = three[(index + 2) % 3], &unit = three[index % 3], &next = three[(index + 1) % 3];
      const bool has_last = index > 0, has_next = index + 1 < count;
      if (has_next) open(index + 1, next);
      if (alone && has_last) multiply_values(last, nothing);
      follow(unit);
      const int64_t chunks = unit.padded / kChunk;
      const int64_t steps =
          (has_next ? steps_of(next) : 0) + (has_last && !alone ? steps_of(last) : 0);
      int64_t key = 0, due = 0;
      const auto between = [&] {
        for (due += chunks; due >= steps && key < unit.padded; due -= steps, key += kChunk)
          soften(unit, key);
      };
      if (has_next) multiply_keys(next, between);
      if (has_last && !alone) multiply_values(last, between);
      for (; key < unit.padded; key += kChunk) soften(unit, key);
    }
    multiply_values(three[(count + 2) % 3], nothing);
  }
};

// Rows of queries as columns of pairs.
void load_queries(const Attention& p, const bf16* q, int64_t rows, int64_t width, bf16* out) {
  const __m512i sign = _mm512_set1_epi16(p.scale < 0 ? static_cast<int16_t>(0x8000) : 0);
  for (int64_t r = 0; r < rows; r += kSide)
    for (int64_t c = 0; c < width; c += kSide)
      for (int64_t half = 0; half < 2; ++half) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int64_t row = r + half * 16 + i;
          const __mmask32 there = row < rows ? first_of_32(p.d - c) : 0;
          x[i] = _mm512_xor_si512(sign, _mm512_maskz_loadu_epi16(there, q + row * p.q.token + c));
        }
        Bf16Pairs::transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          _mm512_storeu_si512(out + r * width + (c / 2 + i) * 64 + half * 32, x[i]);
      }
}

// The transposed result of one strip, divided by the sums.
void store(const Attention& p, const Sequence& s, int64_t head, int64_t first, int64_t rows,
           const float* sum, const float* high, const float* total) {
  bf16* out = static_cast<bf16*>(p.out) + ((s.row + first) * p.H + head) * p.d;
  for (int g = 0; g < 2; ++g) {
    const V inverse{_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_loadu_ps(total + 16 * g))};
    for (int64_t c = 0; c < p.d; c += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        x[i] = _mm512_castps_si512((V::load(sum + (c + i) * kSide + 16 * g) * inverse).v);
      Bf16Pairs::transpose(x);
      const __mmask16 there = static_cast<__mmask16>(p.d - c < 16 ? (1u << (p.d - c)) - 1 : 0xffff);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (16 * g + i < rows)
          _mm256_mask_storeu_epi16(out + (16 * g + i) * p.H * p.d + c, there,
                                   (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(x[i])));
    }
  }
  if (p.lse)
    for (int64_t r = 0; r < rows; ++r)
      p.lse[s.lse + head * p.lse_head + first + r] =
          0.6931471805599453f * (high[r] + std::log2(total[r]));
}

void attend(const Attention& p, const Sequence& s, int64_t head, int64_t first, int64_t last,
            const void* packed, void* scratch) {
  const Layout layout(p.d, s.L);
  const Scratch at(scratch, layout.width);
  const bf16* keys = static_cast<const bf16*>(packed);
  const int64_t rows = last - first, strips = whole(rows, kSide) / kSide;
  const bf16* q = static_cast<const bf16*>(p.q.data) + s.q + first * p.q.token + head * p.q.head;
  load_queries(p, q, rows, layout.width, at.q);
  if (s.L == 0) {  // over no keys: zeros, with the logarithm of no sum
    for (int64_t i = 0; i < strips * kSide * layout.width; ++i) at.sum[i] = 0.0f;
    for (int64_t i = 0; i < strips * kSide; ++i) at.total[i] = 1.0f, at.high[i] = kLowest;
  }
  {
    const TileUnit unit;
    Work{at,
         keys,
         keys + layout.keys * layout.width,
         layout.width,
         layout.keys,
         strips,
         s.L,
         factor_of(p.scale)}
        .run();
  }
  for (int64_t i = 0; i < strips; ++i)
    store(p, s, head, first + i * kSide, rows - i * kSide < kSide ? rows - i * kSide : kSide,
          at.sum + i * kSide * layout.width, at.high + i * kSide, at.total + i * kSide);
}

constexpr AttentionKernels kKernels{kQueries, kSide, packed_bytes, scratch_bytes, pack, attend};

}  // namespace

const AttentionKernels& attention_amx() { return kKernels; }

}  // namespace sgld
