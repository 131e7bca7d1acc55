// What the warp-wide matrix instructions compute, on the operands of all 32 lanes; the layouts of fragments are those
// of the PTX ISA (mma.m16n8k16, ldmatrix, movmatrix). And the 16-bit formats, without hardware support for them.
#pragma once

#include <cstdint>
#include <cstring>

#include "primitives.h"

namespace defgan::cuda::execution {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint16_t round_to_half(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {                                               // below 2^-14: subnormal, spacing 2^-24
    // At 0.5 a float's spacing is 2^-24 as well: the addition rounds to it, and the sum's low bits count the units.
    const float sum = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(sum) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Branchless, for compilers to vectorise: the exponent is rebased by a product with 2^112, which is exact and also
// normalises subnormals; infinity and NaN keep the largest exponent.
inline float value_of_half(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float finite = float_of(magnitude) * 0x1p112f;
  const uint32_t special = 0u - static_cast<uint32_t>(magnitude >= 0x0f800000u);
  return float_of(bits_of(finite) | (special & 0x7f800000u) | static_cast<uint32_t>(half & 0x8000u) << 16);
}
inline float value_of_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// The operands of one mma.m16n8k16, lane by lane.
struct MatrixOperands {
  uint16_t a[32][8];  // registers a0 to a3, lower half first
  uint16_t b[32][4];
  float* c[32];  // four each, replaced by the result
};

// c += a * b. Products of two 16-bit values are exact in float32; each is added to the accumulator in ascending k and
// rounded. The hardware's order and intermediate width are not specified, so results agree to rounding, not in bits.
inline void multiply_accumulate_fragments(Format format, MatrixOperands& operands) {
  float a_values[32 * 8], b_values[32 * 4];
  const uint16_t *a_bits = &operands.a[0][0], *b_bits = &operands.b[0][0];
  if (format == Format::kHalf) {
    for (int i = 0; i < 32 * 8; ++i) a_values[i] = value_of_half(a_bits[i]);
    for (int i = 0; i < 32 * 4; ++i) b_values[i] = value_of_half(b_bits[i]);
  } else {
    for (int i = 0; i < 32 * 8; ++i) a_values[i] = value_of_bfloat16(a_bits[i]);
    for (int i = 0; i < 32 * 4; ++i) b_values[i] = value_of_bfloat16(b_bits[i]);
  }
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][pair + i / 2 * 8 + half] = a_values[lane * 8 + i * 2 + half];
      for (int i = 0; i < 2; ++i) b[pair + i * 8 + half][group] = b_values[lane * 4 + i * 2 + half];
      for (int i = 0; i < 2; ++i) c[group + i * 8][pair + half] = operands.c[lane][i * 2 + half];
    }
  }
  for (int m = 0; m < 16; ++m) {
    float sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = c[m][n];
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
    for (int n = 0; n < 8; ++n) c[m][n] = sum[n];
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 2; ++i) operands.c[lane][i * 2 + half] = c[group + i * 8][pair + half];
  }
}

// ldmatrix.x4.trans: lane 8 j + k names row k (8 values) of matrix j; lane l receives of every matrix the values
// (row 2 (l % 4), column l / 4) and (row 2 (l % 4) + 1, column l / 4).
inline void load_matrix_fragments(const void* const (&rows)[32], uint32_t* const (&results)[32]) {
  uint16_t values[32][8];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(values[lane], rows[lane], 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j) {
      const int row = 8 * j + lane % 4 * 2, column = lane / 4;
      results[lane][j] = values[row][column] | static_cast<uint32_t>(values[row + 1][column]) << 16;
    }
}

// movmatrix.trans: lane l holds and receives row l / 4, columns 2 (l % 4) and the next.
inline void transpose_fragments(const uint32_t (&in)[32], uint32_t (&out)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    const auto element = [&](int r, int c) { return in[r * 4 + c / 2] >> (c % 2 * 16) & 0xffffu; };
    out[lane] = element(column, row) | element(column + 1, row) << 16;
  }
}

}  // namespace defgan::cuda::execution
