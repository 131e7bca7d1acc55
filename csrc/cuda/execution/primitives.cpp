// What the kernels call (primitives.h), for the thread of the launch that runs now.
#include <cstring>

#include "executor.h"

namespace defgan::cuda::execution {

int thread_index() { return executor->self().index; }
int block_index() { return executor->self().block->index; }
int block_count() { return executor->block_count(); }
int block_threads() { return executor->block_threads(); }
char* shared_memory() { return executor->self().block->shared; }

void check_access(Access access, const void* address, size_t bytes, Site site) {
  executor->access(access, address, bytes, site, false);
}

void copy_async_16(void* shared, const void* global, Site site) { executor->issue_copy(shared, global, site); }
void copy_async_commit() { ++executor->self().committed_batches; }
void copy_async_wait(int pending) { executor->wait_for_copies(pending); }

void sync_warp(Site site) { executor->meet_as_warp(Meeting::kSyncWarp, site, nullptr); }
void sync_block(Site site) { executor->meet_as_block(site); }
void sync_team(TeamBarrier* barrier, int blocks, Site site) { executor->meet_as_team(barrier, blocks, site); }

uint32_t shuffle_xor(uint32_t value, int mask, Site site) {
  Thread& me = executor->self();
  me.warp->in[me.lane] = value;
  executor->meet_as_warp(Meeting::kShuffle, site, [](Warp& warp) { std::memcpy(warp.out, warp.in, sizeof(warp.out)); });
  return me.warp->out[(me.lane ^ mask) % kWarpThreads];
}

uint32_t shuffle_from(uint32_t value, int lane, Site site) {
  Thread& me = executor->self();
  me.warp->in[me.lane] = value;
  executor->meet_as_warp(Meeting::kShuffleFrom, site,
                         [](Warp& warp) { std::memcpy(warp.out, warp.in, sizeof(warp.out)); });
  return me.warp->out[lane % kWarpThreads];
}

uint32_t transpose_8x8(uint32_t row, Site site) {
  Thread& me = executor->self();
  me.warp->in[me.lane] = row;
  executor->meet_as_warp(Meeting::kTranspose, site, [](Warp& warp) { transpose_fragments(warp.in, warp.out); });
  return me.warp->out[me.lane];
}

void load_matrix_transposed(uint32_t (&r)[4], const void* shared_row, Site site) {
  Thread& me = executor->self();
  executor->access(Access::kLoadShared, shared_row, 16, site, false);
  me.warp->rows[me.lane] = shared_row;
  me.warp->results[me.lane] = r;
  executor->meet_as_warp(Meeting::kLoadMatrix, site,
                         [](Warp& warp) { load_matrix_fragments(warp.rows, warp.results); });
}

void multiply_accumulate(Format format, float (&c)[4], const Vec4& a, uint32_t b0, uint32_t b1, Site site) {
  Thread& me = executor->self();
  MatrixOperands& operands = me.warp->operands;
  std::memcpy(operands.a[me.lane], &a, sizeof(a));
  std::memcpy(&operands.b[me.lane][0], &b0, sizeof(b0));
  std::memcpy(&operands.b[me.lane][2], &b1, sizeof(b1));
  operands.c[me.lane] = c;
  executor->meet_as_warp(
      Meeting::kMultiply, site,
      format == Format::kHalf ? [](Warp& warp) { multiply_accumulate_fragments(Format::kHalf, warp.operands); }
                              : [](Warp& warp) { multiply_accumulate_fragments(Format::kBfloat16, warp.operands); });
}

uint16_t round_to(Format format, float value) {
  return format == Format::kHalf ? round_to_half(value) : round_to_bfloat16(value);
}
float value_of(Format format, uint16_t bits) {
  return format == Format::kHalf ? value_of_half(bits) : value_of_bfloat16(bits);
}

}  // namespace defgan::cuda::execution
