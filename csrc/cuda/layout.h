// How kernels hold numbers: blocks of 32 channels by the 8 rows of a group, and the arithmetic on single numbers.
//
// In 16 bits a block is two B fragments of mma.m16n8k16 as the lanes of a warp hold them: lane l has 16 bytes, the
// channels {2 (l % 4), + 1} + 8 j of row l / 4. A tile's result (a C fragment) becomes such a block by transposing its
// 8x8 quarters in registers, so activations never need shared memory to change their layout. In float32 a block is
// [channel][row], and lane l has channel l. A lane's part is called a piece: 8 numbers in either storage.
//
// Weights are matrices of destination by source channels, both padded to whole blocks: in 16 bits A fragments
// [matrix][tile of 16 rows][tile of 16 columns][lane][16 bytes]; in float32 [matrix][32 rows][column][row].
#pragma once

#include "device.h"
#include "params.h"

// Keeps a loop a loop, where unrolling would only cost registers and instruction cache.
#ifdef __CUDACC__
#define DEFGAN_NO_UNROLL _Pragma("unroll 1")
#else
#define DEFGAN_NO_UNROLL
#endif

namespace defgan::cuda {

struct alignas(8) Vec2 {
  uint32_t x, y;
};
struct alignas(8) Float2 {
  float x, y;
};

template <class S>
struct Storage {  // Half, Bfloat16
  static constexpr int kBlockBytes = kChunk * kGroupRows * 2;
  static constexpr int kFragmentBytes = kLanes * 16;  // an A fragment has 16x16 weights

  DEFGAN_DEVICE static int channel(int lane, int j) { return lane % 4 * 2 + j % 2 + j / 2 * 8; }
  DEFGAN_DEVICE static int row(int lane, int) { return lane / 4; }
  // Returns where a number is within its block, in bytes.
  DEFGAN_DEVICE static int offset(int channel, int row) {
    const int lane = row * 4 + channel % 8 / 2;
    return lane * 16 + channel / 8 * 4 + channel % 2 * 2;
  }
  DEFGAN_DEVICE static void unpack(const Vec4& words, float (&v)[kPiece]) {
    unpack2<S>(words.x, v[0], v[1]);
    unpack2<S>(words.y, v[2], v[3]);
    unpack2<S>(words.z, v[4], v[5]);
    unpack2<S>(words.w, v[6], v[7]);
  }
  DEFGAN_DEVICE static Vec4 pack(const float (&v)[kPiece]) {
    return Vec4{pack2<S>(v[0], v[1]), pack2<S>(v[2], v[3]), pack2<S>(v[4], v[5]), pack2<S>(v[6], v[7])};
  }
  DEFGAN_DEVICE static void load(const char* block, int lane, float (&v)[kPiece]) {
    unpack(load_global(reinterpret_cast<const Vec4*>(block) + lane), v);
  }
  DEFGAN_DEVICE static void store(char* block, int lane, const float (&v)[kPiece]) {
    store_global(reinterpret_cast<Vec4*>(block) + lane, pack(v));
  }
  DEFGAN_DEVICE static float load_one(const char* at) {
    float low, high;
    unpack2<S>(load_global(reinterpret_cast<const uint16_t*>(at)), low, high);
    return low;
  }
  // Stores the rows 2 pair and 2 pair + 1 of one pixel.
  DEFGAN_DEVICE static void store_pair(char* pixel, int pair, float low, float high) {
    store_global(reinterpret_cast<uint32_t*>(pixel) + pair, pack2<S>(low, high));
  }
};

template <>
struct Storage<float> {
  static constexpr int kBlockBytes = kChunk * kGroupRows * 4;

  DEFGAN_DEVICE static int channel(int lane, int) { return lane; }
  DEFGAN_DEVICE static int row(int, int j) { return j; }
  DEFGAN_DEVICE static int offset(int channel, int row) { return (channel * kGroupRows + row) * 4; }
  DEFGAN_DEVICE static void load(const char* block, int lane, float (&v)[kPiece]) {
    const Float4* at = reinterpret_cast<const Float4*>(block) + lane * 2;
    const Float4 low = load_global(at), high = load_global(at + 1);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
  DEFGAN_DEVICE static void store(char* block, int lane, const float (&v)[kPiece]) {
    Float4* at = reinterpret_cast<Float4*>(block) + lane * 2;
    store_global(at, Float4{v[0], v[1], v[2], v[3]});
    store_global(at + 1, Float4{v[4], v[5], v[6], v[7]});
  }
  DEFGAN_DEVICE static float load_one(const char* at) { return load_global(reinterpret_cast<const float*>(at)); }
  DEFGAN_DEVICE static void store_pair(char* pixel, int pair, float low, float high) {
    store_global(reinterpret_cast<Float2*>(pixel) + pair, Float2{low, high});
  }
};

template <class S>
constexpr int kElementBytes = Storage<S>::kBlockBytes / (kChunk * kGroupRows);

// Puts a struct of the tables together from its 16-byte words, as load(number) gives them.
template <class T, class Load>
DEFGAN_DEVICE T made_of_words(const Load& load) {
  static_assert(sizeof(T) % 16 == 0, "tables are read in 16-byte words");
  union {
    T value;
    Vec4 words[sizeof(T) / 16];
  } u;
  static_for<sizeof(T) / 16>([&](auto i) { u.words[i] = load(i); });
  return u.value;
}
template <class T>
DEFGAN_DEVICE T load_table(const char* at) {
  return made_of_words<T>([&](auto i) { return load_constant(reinterpret_cast<const Vec4*>(at) + i); });
}
template <class T>
DEFGAN_DEVICE T load_shared_table(const T* at) {
  return made_of_words<T>([&](auto i) { return load_shared(reinterpret_cast<const Vec4*>(at) + i); });
}

// NaN passes every activation and its derivative, so that a row that overflowed shows it in its error.
DEFGAN_DEVICE float activate(int activation, float slope, float x) {
  switch (Activation(activation)) {
    case Activation::kRelu: return x < 0 ? 0.0f : x;
    case Activation::kLeakyRelu: return x < 0 ? slope * x : x;
    case Activation::kSigmoid: return 1.0f / (1.0f + exponential(-x));
    case Activation::kTanh: return hyperbolic_tangent(x);
    default: return x;
  }
}

// Returns the gradient times the activation's derivative, which the stored output y tells.
DEFGAN_DEVICE float differentiate(int activation, float slope, float y, float gradient) {
  switch (Activation(activation)) {
    case Activation::kRelu: return y <= 0 ? 0.0f : gradient;
    case Activation::kLeakyRelu: return y <= 0 ? slope * gradient : gradient;
    case Activation::kSigmoid: return gradient * (y * (1.0f - y));
    case Activation::kTanh: return gradient * (1.0f - y * y);
    default: return gradient;
  }
}

// Returns the gradient of half the squared error of a pixel with respect to the sum that it is made of. The factor
// 2 / pixels of the mean is applied where the latent is updated: in 16 bits it would waste the small end of the range.
DEFGAN_DEVICE float image_gradient(int activation, float slope, float sum, float target) {
  const float y = activate(activation, slope, sum);
  return differentiate(activation, slope, y, y - target);
}

// Takes one heavy-ball step with one number of the latent.
DEFGAN_DEVICE void momentum_step(float& latent, float& velocity, float gradient, float scale, float momentum,
                                 float rate) {
  velocity = fused_multiply_add(momentum, velocity, scale * gradient);
  latent = fused_multiply_add(-rate, velocity, latent);
}

DEFGAN_DEVICE void momentum_step(Float4& z, Float4& velocity, const float (&gradient)[4], float scale, float momentum,
                                 float rate) {
  momentum_step(z.x, velocity.x, gradient[0], scale, momentum, rate);
  momentum_step(z.y, velocity.y, gradient[1], scale, momentum, rate);
  momentum_step(z.z, velocity.z, gradient[2], scale, momentum, rate);
  momentum_step(z.w, velocity.w, gradient[3], scale, momentum, rate);
}

// Rows beyond the last one are computed with zeros, so that they disturb nobody, and never written.
DEFGAN_DEVICE float starting_latent(const Call& call, int row, int channel, int latent_size) {
  if (row >= call.rows || channel >= latent_size) return 0.0f;
  const int line = call.start_per_image ? row : row % call.restarts;
  return load_constant(call.start + int64_t(line) * latent_size + channel);
}
DEFGAN_DEVICE float starting_velocity(const Call& call, int row, int channel, int latent_size) {
  if (call.velocities == nullptr || row >= call.rows || channel >= latent_size) return 0.0f;
  return load_constant(call.velocities + int64_t(row) * latent_size + channel);
}
DEFGAN_DEVICE float target_pixel(const Call& call, int row, int pixel, int pixels) {
  return row < call.rows ? load_constant(call.images + int64_t(row / call.restarts) * pixels + pixel) : 0.0f;
}

}  // namespace defgan::cuda
