// The types that both executions of the device primitives share, and how functions for the device are marked.
// Include device.h, not this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define DEFGAN_DEVICE __device__ __forceinline__
#define DEFGAN_DEVICE_NOINLINE __device__ __noinline__ inline
#define DEFGAN_HOST_DEVICE __host__ __device__ inline
#else
#define DEFGAN_DEVICE inline
#define DEFGAN_DEVICE_NOINLINE inline
#define DEFGAN_HOST_DEVICE inline
#endif

namespace defgan::cuda {

constexpr int kWarpThreads = 32;

// 16 bytes, loaded and stored as one.
struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

// Storage formats of activations and weights, as tags; Bits holds one value.
struct Half {
  using Bits = uint16_t;
};
struct Bfloat16 {
  using Bits = uint16_t;
};

// Where all threads of several blocks meet. In global memory, zero when the launch starts; counts arrivals and never
// goes back. A cache line of its own, since every block of the team polls it.
struct alignas(128) TeamBarrier {
  uint32_t arrivals;
  uint32_t unused[31];
};

// f(integral_constant<int, 0>), ..., f(integral_constant<int, N - 1>): a loop that is unrolled by construction, whose
// counter may index registers and be a template argument.
template <class F, int... I>
DEFGAN_DEVICE void static_for_each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
DEFGAN_DEVICE void static_for(F&& f) {
  static_for_each(f, std::make_integer_sequence<int, N>{});
}

}  // namespace defgan::cuda
