// Which 16-bit numbers of a ReLU's output are not zero, as bits and as masks of halves of a word. There the ReLU lets the
// gradient pass, which is all that the way back needs to know of its output.
#pragma once

#include "layout.h"

namespace defgan::cuda {

// 0xffff for each half whose number is not zero.
DEFGAN_DEVICE uint32_t nonzero_halves(uint32_t word) {
  return ((word & 0x7fffu) ? 0xffffu : 0u) | ((word & 0x7fff0000u) ? 0xffff0000u : 0u);
}
// A bit for each of a piece's 8 numbers, set where it is not zero.
DEFGAN_DEVICE uint32_t mask_bits(const Vec4& piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  uint32_t bits = 0;
  static_for<4>([&](auto i) {
    bits |= ((words[i] & 0x7fffu) ? 1u : 0u) << (2 * i);
    bits |= ((words[i] & 0x7fff0000u) ? 1u : 0u) << (2 * i + 1);
  });
  return bits;
}
// 0xffff for each of the two lowest bits that is set.
DEFGAN_DEVICE uint32_t mask_halves(uint32_t bits) {
  return ((bits & 1) ? 0xffffu : 0u) | ((bits & 2) ? 0xffff0000u : 0u);
}

}  // namespace defgan::cuda
