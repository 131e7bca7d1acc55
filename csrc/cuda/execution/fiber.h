// A thread of execution that is switched by hand: what runs one GPU thread on the CPU. A switch costs a few
// nanoseconds (x86-64: six registers and the stack pointer are exchanged) or, with -DDEFGAN_PORTABLE_FIBERS and on
// other processors, two system calls (ucontext). AddressSanitizer is told of every switch; ThreadSanitizer is not, and
// would mistake fibers for calls that never return.
#pragma once

#include <cstddef>

namespace defgan::cuda::execution {

class Fiber {
 public:
  // The context that creates the others: it has a stack already.
  Fiber();
  explicit Fiber(size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry, which must not return. Whatever ran on its stack before is forgotten.
  void prepare(void (*entry)());

  // Suspends `from`, which must be the caller, and resumes `to`.
  static void switch_to(Fiber& from, Fiber& to);

  // What entry must call first.
  static void entered();

 private:
  struct Context;
  Context* context_;
};

// "x86-64" or "ucontext".
const char* fiber_implementation();

}  // namespace defgan::cuda::execution
