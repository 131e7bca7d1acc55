// Runs kernels on the CPU: a kernel is a callable that every thread of every block executes on a fiber of its own.
// What a test or a driver needs: memory that kernels may touch, a launch, the order of threads, the failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

namespace defgan::cuda::execution {

// A kernel did what no kernel may do; the message says which thread did what, where, and what it conflicts with.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The global memory that kernels may touch: named ranges of the caller's memory. Kernels that touch anything else
// fail. What was written by one launch may be read by the next.
class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // initialised: the caller has written all of it. Otherwise it is filled with NaN (bytes 0xFF), and reading what no
  // kernel has written is a failure.
  void add(const std::string& name, void* data, size_t bytes, bool initialised);
  void add(const std::string& name, const void* data, size_t bytes);  // initialised; never written
  // The caller has written these bytes of a range that was added before (as cudaMemset and cudaMemcpy do).
  void mark_initialised(const void* data, size_t bytes);
  void remove(const void* data);

  struct State;
  State& state() { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

struct Options {
  // 0: warp after warp, lane after lane. Otherwise a random order of lanes, warps and blocks that depends on the seed
  // alone.
  uint64_t seed = 0;
  size_t stack_bytes = 256 * 1024;  // of each thread
};

// Runs kernel() on blocks * threads threads and returns when all have ended. Throws Failure, after which no thread of
// the launch runs on (their stacks are dropped without destructors: a kernel owns nothing).
// cooperative: all blocks are resident at once and may meet in sync_team; otherwise one block runs after the other.
void launch(Memory& memory, int blocks, int threads, size_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel, const Options& options = {});

}  // namespace defgan::cuda::execution
