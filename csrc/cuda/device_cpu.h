// The device primitives on the CPU: every access, barrier and collective goes through the executor, which checks it
// (execution/). The extra argument is the place of the call, for its messages.
// Include device.h, not this file.
#pragma once

#include <cmath>
#include <cstring>

#include "execution/primitives.h"

namespace defgan::cuda {

using execution::Site;

inline int thread_index() { return execution::thread_index(); }
inline int block_index() { return execution::block_index(); }
inline int block_count() { return execution::block_count(); }
inline int block_threads() { return execution::block_threads(); }
inline char* shared_memory() { return execution::shared_memory(); }

// ---- memory

namespace detail {

template <class T>
T load(execution::Access access, const T* p, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16);
  execution::check_access(access, p, sizeof(T), site);
  T value;
  std::memcpy(&value, static_cast<const void*>(p), sizeof(T));
  return value;
}

template <class T>
void store(execution::Access access, T* p, const T& value, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16);
  execution::check_access(access, p, sizeof(T), site);
  std::memcpy(static_cast<void*>(p), &value, sizeof(T));
}

template <class S>
constexpr execution::Format format_of() {
  static_assert(std::is_same_v<S, Half> || std::is_same_v<S, Bfloat16>);
  return std::is_same_v<S, Half> ? execution::Format::kHalf : execution::Format::kBfloat16;
}

}  // namespace detail

template <class T>
T load_constant(const T* p, Site site = Site::here()) {
  return detail::load(execution::Access::kLoadConstant, p, site);
}
template <class T>
T load_global(const T* p, Site site = Site::here()) {
  return detail::load(execution::Access::kLoadGlobal, p, site);
}
template <class T>
void store_global(T* p, const std::common_type_t<T>& value, Site site = Site::here()) {
  detail::store(execution::Access::kStoreGlobal, p, value, site);
}
template <class T>
T load_shared(const T* p, Site site = Site::here()) {
  return detail::load(execution::Access::kLoadShared, p, site);
}
template <class T>
void store_shared(T* p, const std::common_type_t<T>& value, Site site = Site::here()) {
  detail::store(execution::Access::kStoreShared, p, value, site);
}

// A struct, by reference; checked here as if all of it were loaded here.
template <class T>
const T& view_shared(const T* p, Site site = Site::here()) {
  static_assert(alignof(T) % 16 == 0, "checked in 16-byte words");
  for (size_t i = 0; i < sizeof(T); i += 16)
    execution::check_access(execution::Access::kLoadShared, reinterpret_cast<const char*>(p) + i, 16, site);
  return *p;
}

// The bytes arrive when the copying thread waits for them, never earlier.
inline void copy_async_16(void* shared, const void* global, Site site = Site::here()) {
  execution::copy_async_16(shared, global, site);
}
inline void copy_async_commit() { execution::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  execution::copy_async_wait(kPending);
}

// ---- barriers

inline void sync_warp(Site site = Site::here()) { execution::sync_warp(site); }
inline void sync_block(Site site = Site::here()) { execution::sync_block(site); }
inline void sync_team(TeamBarrier* barrier, int blocks, Site site = Site::here()) {
  execution::sync_team(barrier, blocks, site);
}

// ---- warp collectives

inline float shuffle_xor(float value, int mask, Site site = Site::here()) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = execution::shuffle_xor(bits, mask, site);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
inline double shuffle_xor(double value, int mask, Site site = Site::here()) {
  uint32_t words[2];
  std::memcpy(words, &value, sizeof(words));
  for (uint32_t& word : words) word = execution::shuffle_xor(word, mask, site);
  std::memcpy(&value, words, sizeof(words));
  return value;
}
inline int32_t shuffle_from(int32_t value, int lane, Site site = Site::here()) {
  return static_cast<int32_t>(execution::shuffle_from(static_cast<uint32_t>(value), lane, site));
}
inline uint32_t transpose_8x8(uint32_t row, Site site = Site::here()) { return execution::transpose_8x8(row, site); }
inline void load_matrix_transposed(uint32_t (&r)[4], const void* shared_row, Site site = Site::here()) {
  execution::load_matrix_transposed(r, shared_row, site);
}
template <class S>
void multiply_accumulate(float (&c)[4], const Vec4& a, uint32_t b0, uint32_t b1, Site site = Site::here()) {
  execution::multiply_accumulate(detail::format_of<S>(), c, a, b0, b1, site);
}

// ---- arithmetic

template <class S>
uint16_t to_bits(float value) {
  return execution::round_to(detail::format_of<S>(), value);
}
template <class S>
uint32_t pack2(float low, float high) {
  return to_bits<S>(low) | static_cast<uint32_t>(to_bits<S>(high)) << 16;
}
template <class S>
void unpack2(uint32_t packed, float& low, float& high) {
  low = execution::value_of(detail::format_of<S>(), static_cast<uint16_t>(packed));
  high = execution::value_of(detail::format_of<S>(), static_cast<uint16_t>(packed >> 16));
}

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exponential(float x) { return std::exp(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }

}  // namespace defgan::cuda
