// The device primitives on a GPU (sm_80 and later): intrinsics where CUDA has them, PTX where it has not.
// Include device.h, not this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace defgan::cuda {

DEFGAN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEFGAN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEFGAN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
DEFGAN_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }

DEFGAN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char defgan_shared_memory[];
  return defgan_shared_memory;
}

// ---- memory

namespace detail {

// The type that a load or store instruction of this width works on.
template <size_t kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = unsigned char;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
template <class T>
using WordOf = typename Word<sizeof(T)>::Type;

template <class To, class From>
DEFGAN_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

DEFGAN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

}  // namespace detail

template <class T>
DEFGAN_DEVICE T load_constant(const T* p) {
  return detail::bits_as<T>(__ldg(reinterpret_cast<const detail::WordOf<T>*>(p)));
}

namespace detail {

// volatile: in its place among barriers and stores, which __ldca (an asm that depends on its address alone) need not keep.
DEFGAN_DEVICE void load_word(const unsigned char* p, unsigned char& v) {
  unsigned short wide;
  asm volatile("ld.global.u8 %0, [%1];\n" : "=h"(wide) : "l"(p));
  v = static_cast<unsigned char>(wide);
}
DEFGAN_DEVICE void load_word(const unsigned short* p, unsigned short& v) {
  asm volatile("ld.global.u16 %0, [%1];\n" : "=h"(v) : "l"(p));
}
DEFGAN_DEVICE void load_word(const unsigned int* p, unsigned int& v) {
  asm volatile("ld.global.u32 %0, [%1];\n" : "=r"(v) : "l"(p));
}
DEFGAN_DEVICE void load_word(const uint2* p, uint2& v) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(p));
}
DEFGAN_DEVICE void load_word(const uint4* p, uint4& v) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
}

}  // namespace detail

// Through L1: the acquire in sync_team empties it, so after that barrier nothing stale is read.
template <class T>
DEFGAN_DEVICE T load_global(const T* p) {
  detail::WordOf<T> word;
  detail::load_word(reinterpret_cast<const detail::WordOf<T>*>(p), word);
  return detail::bits_as<T>(word);
}

template <class T>
DEFGAN_DEVICE void store_global(T* p, const std::common_type_t<T>& value) {
  __stcg(reinterpret_cast<detail::WordOf<T>*>(p), detail::bits_as<detail::WordOf<T>>(value));
}

// Addresses are to be made from shared_memory() where they are used: from there the compiler knows that they are shared,
// and emits LDS and STS. No __builtin_assume(__isShared(p)) in its stead: about a pointer kept in a struct that is handed
// to a function which is not inlined, nvcc 13.0 found it impossible and removed the path (tools/cuda_check.py looks for
// paths that end nowhere).
namespace detail {

// volatile, so that a loop can say how far ahead of their use its operands are loaded.
DEFGAN_DEVICE void load_shared_word(uint32_t p, unsigned char& v) {
  unsigned short wide;
  asm volatile("ld.shared.u8 %0, [%1];\n" : "=h"(wide) : "r"(p));
  v = static_cast<unsigned char>(wide);
}
DEFGAN_DEVICE void load_shared_word(uint32_t p, unsigned short& v) {
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(v) : "r"(p));
}
DEFGAN_DEVICE void load_shared_word(uint32_t p, unsigned int& v) {
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(p));
}
DEFGAN_DEVICE void load_shared_word(uint32_t p, uint2& v) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "r"(p));
}
DEFGAN_DEVICE void load_shared_word(uint32_t p, uint4& v) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p));
}
DEFGAN_DEVICE void store_shared_word(uint32_t p, unsigned char v) {
  asm volatile("st.shared.u8 [%0], %1;\n" ::"r"(p), "h"(static_cast<unsigned short>(v)) : "memory");
}
DEFGAN_DEVICE void store_shared_word(uint32_t p, unsigned short v) {
  asm volatile("st.shared.u16 [%0], %1;\n" ::"r"(p), "h"(v) : "memory");
}
DEFGAN_DEVICE void store_shared_word(uint32_t p, unsigned int v) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(p), "r"(v) : "memory");
}
DEFGAN_DEVICE void store_shared_word(uint32_t p, const uint2& v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};\n" ::"r"(p), "r"(v.x), "r"(v.y) : "memory");
}
DEFGAN_DEVICE void store_shared_word(uint32_t p, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace detail

template <class T>
DEFGAN_DEVICE T load_shared(const T* p) {
  detail::WordOf<T> word;
  detail::load_shared_word(detail::shared_address(p), word);
  return detail::bits_as<T>(word);
}

template <class T>
DEFGAN_DEVICE void store_shared(T* p, const std::common_type_t<T>& value) {
  detail::store_shared_word(detail::shared_address(p), detail::bits_as<detail::WordOf<T>>(value));
}

// A struct in shared memory, by reference. Whoever reads it must not do so beyond the next barrier after which it may be
// written again: what the reference is used for is not checked, only this call.
template <class T>
DEFGAN_DEVICE const T& view_shared(const T* p) {
  return *p;
}

// Global to shared past the registers (cp.async.cg); both 16-byte aligned.
DEFGAN_DEVICE void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(detail::shared_address(shared)), "l"(global)
               : "memory");
}
DEFGAN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
DEFGAN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- barriers

DEFGAN_DEVICE void sync_warp() { __syncwarp(); }
DEFGAN_DEVICE void sync_block() { __syncthreads(); }

DEFGAN_DEVICE void sync_team(TeamBarrier* barrier, int blocks) {
  // The block's barrier orders its threads' accesses before thread 0's release (it is cumulative), and thread 0's
  // acquire before the accesses that follow the second one.
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;\n" : "=r"(before) : "l"(&barrier->arrivals) : "memory");
    const uint32_t all = (before / blocks + 1) * blocks;
    now = before + 1;
    while (now < all)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(now) : "l"(&barrier->arrivals) : "memory");
  }
  __syncthreads();
}

// ---- warp collectives

DEFGAN_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEFGAN_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The value that lane `lane` has; the same lane for all.
DEFGAN_DEVICE int32_t shuffle_from(int32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

DEFGAN_DEVICE uint32_t transpose_8x8(uint32_t row) {
  uint32_t column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(column) : "r"(row));
  return column;
}

DEFGAN_DEVICE void load_matrix_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

template <class S>
DEFGAN_DEVICE void multiply_accumulate(float (&c)[4], const Vec4& a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<S, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// ---- arithmetic

template <class S>
DEFGAN_DEVICE uint32_t pack2(float low, float high) {
  uint32_t packed;  // the instruction takes the upper half first
  if constexpr (std::is_same_v<S, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class S>
DEFGAN_DEVICE void unpack2(uint32_t packed, float& low, float& high) {
  if constexpr (std::is_same_v<S, Half>) {
    const float2 both = __half22float2(detail::bits_as<__half2>(packed));
    low = both.x;
    high = both.y;
  } else {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
  }
}

template <class S>
DEFGAN_DEVICE uint16_t to_bits(float value) {
  if constexpr (std::is_same_v<S, Half>)
    return __half_as_ushort(__float2half_rn(value));
  else
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

DEFGAN_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEFGAN_DEVICE float exponential(float x) { return __expf(x); }
DEFGAN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEFGAN_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
DEFGAN_DEVICE double square_root(double x) { return __dsqrt_rn(x); }

}  // namespace defgan::cuda
