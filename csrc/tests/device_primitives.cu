// Every device primitive once, for nvcc: compiled for all architectures without a warning, and its PTX read
// (python_tests/kernels_cuda/test_device_primitives.py). Nothing runs it.
#include "../cuda/device.h"

namespace defgan::cuda {
namespace {

struct alignas(16) Pair {
  float values[8];
};

// Not inlined, as parts of the kernels are: addresses are made from the shared array where they are used, at an offset
// that the compiler does not know.
DEFGAN_DEVICE_NOINLINE float from_shared(int offset) {
  char* const shared = shared_memory() + offset;
  store_shared(reinterpret_cast<uint8_t*>(shared) + 77, uint8_t{1});
  return load_shared(reinterpret_cast<const float*>(shared)) +
         load_shared(reinterpret_cast<const Float4*>(shared) + 1).y +
         view_shared(reinterpret_cast<const Pair*>(shared) + 2).values[3];
}

template <class T>
DEFGAN_DEVICE void copy_each_way(const char* constant, char* global, char* shared) {
  const int i = thread_index();
  const T value = load_constant(reinterpret_cast<const T*>(constant) + i);
  store_shared(reinterpret_cast<T*>(shared) + i, value);
  sync_warp();
  store_global(reinterpret_cast<T*>(global) + i, load_shared(reinterpret_cast<T*>(shared) + (i ^ 1)));
  sync_block();
  store_shared(reinterpret_cast<T*>(shared) + i, load_global(reinterpret_cast<const T*>(global) + (i ^ 32)));
  sync_block();
}

template <class S>
__global__ void primitives(const char* constant, char* global, TeamBarrier* barrier) {
  char* const shared = shared_memory();
  copy_each_way<uint8_t>(constant, global, shared);
  copy_each_way<uint16_t>(constant, global, shared);
  copy_each_way<float>(constant, global, shared);
  copy_each_way<double>(constant, global, shared);
  copy_each_way<Vec4>(constant, global, shared);
  copy_each_way<Float4>(constant, global, shared);

  copy_async_16(shared + 16 * thread_index(), constant + 16 * thread_index());
  copy_async_commit();
  copy_async_16(shared + 16 * (thread_index() + block_threads()), constant + 16 * thread_index());
  copy_async_commit();
  copy_async_wait<1>();
  sync_block();

  uint32_t r[4];
  load_matrix_transposed(r, shared + 16 * (thread_index() % kWarpThreads));
  const Vec4 a = load_constant(reinterpret_cast<const Vec4*>(constant) + thread_index());
  float sum[4] = {};
  static_for<3>([&](auto i) { multiply_accumulate<S>(sum, a, r[i], transpose_8x8(r[i + 1])); });
  copy_async_wait<0>();
  sync_team(barrier, block_count());

  float low, high;
  unpack2<S>(pack2<S>(sum[0], shuffle_xor(sum[1], 4)), low, high);
  sum[2] = exponential(low) + hyperbolic_tangent(high) + square_root(sum[2]) + fused_multiply_add(low, high, sum[3]);
  store_global(reinterpret_cast<float*>(global) + block_index() * block_threads() + thread_index(),
               sum[2] + from_shared(16 * block_index()) + float(shuffle_from(thread_index(), 3)));
  store_global(reinterpret_cast<uint16_t*>(global) + 8192 + thread_index(), to_bits<S>(low));
}

template __global__ void primitives<Half>(const char*, char*, TeamBarrier*);
template __global__ void primitives<Bfloat16>(const char*, char*, TeamBarrier*);

}  // namespace
}  // namespace defgan::cuda
