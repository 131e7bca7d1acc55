// What device_cpu.h calls: the running thread's identity, checked accesses, and the meeting points of warps, blocks
// and teams. Out of line on purpose: kernels are unrolled hundreds of times, and tests compile them often.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../device_types.h"

namespace defgan::cuda::execution {

// Where in the kernels' source a primitive is used: Site::here() as a default argument is evaluated at the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

int thread_index();
int block_index();
int block_count();
int block_threads();
char* shared_memory();

enum class Access { kLoadConstant, kLoadGlobal, kStoreGlobal, kLoadShared, kStoreShared };
// Fails unless the running thread may do this now; records that it did.
void check_access(Access access, const void* address, size_t bytes, Site site);

void copy_async_16(void* shared, const void* global, Site site);
void copy_async_commit();
void copy_async_wait(int pending);

void sync_warp(Site site);
void sync_block(Site site);
void sync_team(TeamBarrier* barrier, int blocks, Site site);

uint32_t shuffle_xor(uint32_t value, int mask, Site site);
uint32_t shuffle_from(uint32_t value, int lane, Site site);
uint32_t transpose_8x8(uint32_t row, Site site);
void load_matrix_transposed(uint32_t (&r)[4], const void* shared_row, Site site);
enum class Format { kHalf, kBfloat16 };
void multiply_accumulate(Format format, float (&c)[4], const Vec4& a, uint32_t b0, uint32_t b1, Site site);

// To the nearest, ties to even; beyond the largest finite value infinity; NaN is the GPU's, 0x7fff.
uint16_t round_to(Format format, float value);
float value_of(Format format, uint16_t bits);

}  // namespace defgan::cuda::execution
