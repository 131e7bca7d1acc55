// Runs kernels on the CPU: a kernel is a callable that every thread of every block executes on a fiber of its own.
// Here is what a test or a driver needs: the memory that kernels may touch, the launch, the order of threads, and the
// failure that reports what no kernel may do. docs/gpu.md lists the rules that are checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

namespace defgan::cuda::execution {

// One line: which thread did what, where in the source, to which byte of which memory, and what it conflicts with.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The global memory that kernels may touch: named ranges of the caller's memory, which must outlive this. Kernels that
// touch anything else fail. What one launch wrote, the next may read.
class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // initialised: the caller has written all of it. Otherwise it is filled with NaN (bytes 0xff), and a kernel that
  // reads what nothing wrote fails. Throws std::invalid_argument where ranges overlap.
  void add(const std::string& name, void* data, size_t bytes, bool initialised);
  void add(const std::string& name, const void* data, size_t bytes);  // constant: a kernel that writes it fails
  // These bytes, of a range that was added, have been written by the caller since (as by cudaMemset or cudaMemcpy).
  void mark_initialised(const void* data, size_t bytes);
  void remove(const void* data);

  class Ranges;
  Ranges& ranges() { return *ranges_; }

 private:
  std::unique_ptr<Ranges> ranges_;
};

struct Options {
  // 0: block after block, warp after warp, lane after lane, as far as barriers allow. Otherwise a random order of
  // blocks, warps and lanes that depends on the seed alone.
  uint64_t seed = 0;
};

// Runs kernel() on blocks * threads threads and returns when all have ended. Throws Failure, after which no thread of
// the launch runs on (their stacks are dropped without running destructors: a kernel owns nothing), and what kernel()
// throws. cooperative: all blocks are resident at once and may meet in sync_team; otherwise one runs after the other.
// Launches of several threads of the process take turns.
void launch(Memory& memory, int blocks, int threads, size_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel, const Options& options = {});

// How threads are switched in this build: "x86-64" or "ucontext".
const char* fiber_implementation();

}  // namespace defgan::cuda::execution
