#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(DEFGAN_PORTABLE_FIBERS)
#define DEFGAN_PORTABLE_FIBERS
#endif
#ifdef DEFGAN_PORTABLE_FIBERS
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DEFGAN_ADDRESS_SANITIZER
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define DEFGAN_ADDRESS_SANITIZER
#endif
#ifdef DEFGAN_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace defgan::cuda::execution {

struct Fiber::Context {
  char* stack = nullptr;  // null: not ours to free
  size_t stack_bytes = 0;
  size_t unused_bytes = 0;  // at the top
#ifdef DEFGAN_PORTABLE_FIBERS
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
#ifdef DEFGAN_ADDRESS_SANITIZER
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
#endif
};

#ifdef DEFGAN_ADDRESS_SANITIZER
namespace {
// Who switched last: its stack's bounds become known when the one it switched to asks.
Fiber* switched_from = nullptr;
}  // namespace
#endif

#ifndef DEFGAN_PORTABLE_FIBERS
// The System V ABI keeps rbx, rbp and r12 to r15 across calls; all else is the caller's to save. Rounding and
// exception masks (MXCSR, x87 control word) are left alone: kernels do not touch them.
extern "C" void defgan_switch_stack(void** save, void* resume);
asm(R"(
.text
.p2align 4
.globl defgan_switch_stack
.hidden defgan_switch_stack
.type defgan_switch_stack, @function
defgan_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size defgan_switch_stack, . - defgan_switch_stack
)");
#endif

Fiber::Fiber() : context_(new Context) {}

Fiber::Fiber(size_t stack_bytes) : context_(new Context) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Stacks that all end at a page's end would share a few lines of the first-level cache among all threads of a warp.
  constexpr size_t kLine = 64, kColours = 61;
  static size_t created = 0;
  context_->unused_bytes = created++ % kColours * kLine;
  context_->stack_bytes = (stack_bytes + context_->unused_bytes + page - 1) / page * page + page;
  void* memory =
      mmap(nullptr, context_->stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    delete context_;
    throw std::bad_alloc();
  }
  context_->stack = static_cast<char*>(memory);
  // The lowest page is never there: a stack that overflows faults instead of writing into its neighbour.
  mprotect(memory, page, PROT_NONE);
#ifdef DEFGAN_ADDRESS_SANITIZER
  context_->bottom = context_->stack + page;
  context_->size = context_->stack_bytes - page;
#endif
}

Fiber::~Fiber() {
  if (context_->stack != nullptr) munmap(context_->stack, context_->stack_bytes);
  delete context_;
}

void Fiber::prepare(void (*entry)()) {
#ifdef DEFGAN_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(context_->bottom, context_->size);
  context_->fake_stack = nullptr;
#endif
#ifdef DEFGAN_PORTABLE_FIBERS
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  getcontext(&context_->registers);
  context_->registers.uc_stack.ss_sp = context_->stack + page;
  context_->registers.uc_stack.ss_size = context_->stack_bytes - page - context_->unused_bytes;
  context_->registers.uc_link = nullptr;
  makecontext(&context_->registers, entry, 0);
#else
  // As if entry had been called: six zero registers to pop, entry to return to, and a zero where its own return
  // address would be, so that the stack is 8 off a multiple of 16 on entry.
  void** top = reinterpret_cast<void**>(context_->stack + context_->stack_bytes - context_->unused_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context_->stack_pointer = top;
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
#ifdef DEFGAN_ADDRESS_SANITIZER
  switched_from = &from;
  __sanitizer_start_switch_fiber(&from.context_->fake_stack, to.context_->bottom, to.context_->size);
#endif
#ifdef DEFGAN_PORTABLE_FIBERS
  swapcontext(&from.context_->registers, &to.context_->registers);
#else
  defgan_switch_stack(&from.context_->stack_pointer, to.context_->stack_pointer);
#endif
#ifdef DEFGAN_ADDRESS_SANITIZER
  Context* previous = switched_from->context_;
  __sanitizer_finish_switch_fiber(from.context_->fake_stack, &previous->bottom, &previous->size);
#endif
}

void Fiber::entered() {
#ifdef DEFGAN_ADDRESS_SANITIZER
  Context* previous = switched_from->context_;
  __sanitizer_finish_switch_fiber(nullptr, &previous->bottom, &previous->size);
#endif
}

const char* fiber_implementation() {
#ifdef DEFGAN_PORTABLE_FIBERS
  return "ucontext";
#else
  return "x86-64";
#endif
}

}  // namespace defgan::cuda::execution
