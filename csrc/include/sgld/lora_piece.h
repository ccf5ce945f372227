// Merging and unmerging 8 weights of a row, whose codes are one byte of each word: the work of a thread of a GPU.
#pragma once

#include "sgld/lora_element.h"

namespace sgld {

constexpr int kLoraPiece = 8;

template <class T>
struct LoraPiece {
  T weight[kLoraPiece];
};

// What merging 8 weights gives: byte `p` of `planes` is bit p of their codes, `escaped` has a bit for each escape.
template <class T>
struct LoraMergedPiece {
  LoraPiece<T> merged;
  uint32_t planes = 0;
  uint32_t escaped = 0;
  uint32_t checksum = 0;
};

template <class T>
SGLD_HOST_DEVICE static inline LoraBits<T> lora_bits(T x) {
  LoraBits<T> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
SGLD_HOST_DEVICE static inline LoraMergedPiece<T> lora_merge_piece(const LoraPiece<T>& old,
                                                                   const float* update, int bits,
                                                                   uint32_t column) {
  LoraMergedPiece<T> r;
  for (int j = 0; j < kLoraPiece; ++j) {
    const LoraBits<T> was = lora_bits(old.weight[j]);
    narrow(widen(old.weight[j]) + update[j], &r.merged.weight[j]);
    r.checksum += lora_checksum<T>(was, column + j);
    if (bits == 0) continue;
    const uint32_t code = lora_code<T>(was, lora_recomputed(r.merged.weight[j], update[j]), bits);
    r.escaped |= uint32_t{code == (1u << bits) - 1} << j;
    for (int p = 0; p < kLoraMaxBits; ++p) r.planes |= (code >> p & 1u) << (8 * p + j);
  }
  return r;
}

// The weights before the merge; those that escaped still have to come from the list.
template <class T>
SGLD_HOST_DEVICE static inline LoraPiece<T> lora_unmerge_piece(const LoraPiece<T>& merged,
                                                               const float* update, uint32_t planes,
                                                               int bits) {
  LoraPiece<T> r;
  for (int j = 0; j < kLoraPiece; ++j) {
    uint32_t code = 0;
    for (int p = 0; p < kLoraMaxBits; ++p) code |= (planes >> (8 * p + j) & 1u) << p;
    const LoraBits<T> was =
        lora_decoded<T>(lora_recomputed(merged.weight[j], update[j]), code, bits);
    memcpy(&r.weight[j], &was, sizeof was);
  }
  return r;
}

// The escapes of 8 codes: those with all bits set.
SGLD_HOST_DEVICE static inline uint32_t lora_piece_escaped(uint32_t planes, int bits) {
  uint32_t mask = 0xffu;
  for (int p = 0; p < kLoraMaxBits; ++p)
    if (p < bits) mask &= planes >> (8 * p);
  return mask & 0xffu;
}

}  // namespace sgld
