// Whether a long call shall end before it is done, because a signal came, say. What embeds the kernels names a question;
// the thread that called asks it now and then, since handlers of signals run there and nowhere else.
#pragma once

#include <atomic>
#include <exception>

namespace defgan::cpu {

// Returns null where the call shall go on, else the exception that ends it. Must not throw.
using Question = std::exception_ptr (*)();

// From now on calls ask this; nullptr: nothing.
void use_question(Question question);

// The interruption of one call.
class Interruption {
 public:
  Interruption();
  Interruption(const Interruption&) = delete;

  // Asks, where this thread has not asked for a tenth of a second. For the calling thread alone. `release`, unless null,
  // is called before the question: it gives up what this thread holds of its processor and takes back by itself.
  void ask(void (*release)() = nullptr);

  // Whether the call shall end. Once true it stays true.
  bool heard() const { return heard_.load(std::memory_order_acquire); }

  // Throws the answer where there was one. For the calling thread alone, when the call's other threads are done.
  void rethrow() const {
    if (answer_) std::rethrow_exception(answer_);
  }

 private:
  const unsigned float_control_;  // as the caller has it
  std::atomic<bool> heard_{false};
  std::exception_ptr answer_;
};

}  // namespace defgan::cpu
