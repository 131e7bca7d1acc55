// The nearest candidates of an image: what the CPU's and the GPU's kernels share. No torch, no CUDA headers.
//
// Images and candidates become whole numbers of 14 bits, so that sums of products are exact: the order of sums, the
// instruction set, the batch and the number of threads cannot change a bit, and equal distances are equal. A distance is
// compared as its score, |c|^2 - 2 x.c, since |x|^2 is the same for all candidates of an image.
#pragma once

#include <cstdint>

#include "plan.h"

#ifdef __CUDACC__
#define DEFGAN_NEAREST __host__ __device__ inline
#else
#define DEFGAN_NEAREST inline
#endif

namespace defgan::nearest {

// Levels on either side of the range's centre. bfloat16 has 128 between 1/2 and 1, where this has 4,096.
constexpr int kLevels = 8191;

// Pairs of pixels whose products may be summed in 32 bits.
constexpr int kExactPairs = 16;
static_assert(int64_t(kLevels) * kLevels * 2 * kExactPairs <= INT32_MAX, "a chunk's sum must fit");

// All candidates of one call, packed, take at most this many bytes.
constexpr int64_t kMaxBytes = int64_t(200) << 20;

// A value's level is (value - centre) * levels_per_unit, rounded.
struct Scale {
  float centre, levels_per_unit;
};

// Scores are below 2^60 in magnitude. Candidates that do not take part come after those that do, candidates whose images
// are not finite after all others.
constexpr int64_t kNotDrawn = int64_t(1) << 60, kNotFinite = int64_t(1) << 61;

// Whether the generator's last layer bounds its pixels, so that the scale is known without decoding.
inline bool bounded(const Plan& plan) {
  const Activation last = plan.layers.back().activation;
  return last == Activation::kSigmoid || last == Activation::kTanh;
}

// `largest` is the largest magnitude of all finite candidates' pixels; it is not read where the plan bounds them.
DEFGAN_NEAREST Scale scale_of(bool is_bounded, bool is_sigmoid, float largest) {
  if (is_bounded) return is_sigmoid ? Scale{0.5f, 2.0f * kLevels} : Scale{0.0f, float(kLevels)};
  return {0.0f, largest > 0 ? float(kLevels) / largest : float(kLevels)};
}
inline bool is_sigmoid(const Plan& plan) { return plan.layers.back().activation == Activation::kSigmoid; }

// Stands for what is not finite where magnitudes are compared; no finite pixel comes near it.
constexpr float kBeyond = 3.0e38f;

DEFGAN_NEAREST bool is_finite(float x) { return x - x == 0.0f; }

// To the nearest, ties to even, for magnitudes up to 2^22: adds and takes away 1.5 * 2^23. Clamped to the levels.
DEFGAN_NEAREST int32_t to_level(float scaled) {
  const float magic = 12582912.0f;
  const float rounded = (scaled + magic) - magic;
  const float low = rounded < float(-kLevels) ? float(-kLevels) : rounded;
  return int32_t(low > float(kLevels) ? float(kLevels) : low);
}

// A candidate's pixel. A finite value far outside of a scale that other candidates gave is clamped.
DEFGAN_NEAREST int32_t candidate_level(Scale scale, float value) {
  const float scaled = (value - scale.centre) * scale.levels_per_unit, most = 2.0f * kLevels;
  return to_level(scaled > most ? most : scaled < -most ? -most : scaled);
}

// An image whose pixels are beyond the candidates' range is divided by the power of two that brings it into the levels,
// and its products are multiplied by it again.
struct ImageScale {
  float factor;  // 2^-exponent
  int exponent;  // -1: the image is not finite, and every candidate is as far as any other
};

// `largest` is the largest |value - centre| * levels_per_unit of the image's pixels, kBeyond where one is not finite.
DEFGAN_NEAREST ImageScale image_scale(float largest) {
  if (largest >= kBeyond) return {0.0f, -1};
  ImageScale s{1.0f, 0};
  for (; largest * s.factor > kLevels + 0.25f; ++s.exponent) s.factor *= 0.5f;
  return s;
}

DEFGAN_NEAREST int32_t image_level(Scale scale, ImageScale own, float value) {
  return to_level((value - scale.centre) * scale.levels_per_unit * own.factor);
}

// By which the product of levels is multiplied in a score: twice the image's power of two, bounded so that no score
// reaches 2^60. For an image that is brighter than that (4 million times the candidates' range at 28x28) the products count
// for too little.
DEFGAN_NEAREST int64_t product_factor(int exponent, int64_t pixels) {
  int most = 33;
  for (int64_t p = 1; p < pixels; p *= 2) --most;
  const int shift = exponent + 1 < most ? exponent + 1 : most;
  return int64_t(1) << (shift > 1 ? shift : 1);
}

// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
DEFGAN_NEAREST uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The bits that decide, for the image whose draw this is, over the 64 pairs of neighbouring candidates from
// 128 * `block` on. Of each pair (2j, 2j + 1) one takes part: the second where bit j % 64 is set.
DEFGAN_NEAREST uint64_t drawn_bits(int64_t draw, int64_t block) {
  return mix(mix(uint64_t(draw)) + uint64_t(block + 1) * 0x9e3779b97f4a7c15u);
}
DEFGAN_NEAREST bool takes_part(uint64_t bits, int64_t candidate) {
  return ((bits >> (candidate / 2 % 64)) & 1) == uint64_t(candidate & 1);
}

}  // namespace defgan::nearest
