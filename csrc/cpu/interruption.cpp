#include "interruption.h"

#include <time.h>

#include <cstdint>

#include "float_control.h"

namespace defgan::cpu {
namespace {

std::atomic<Question> named_question{nullptr};

// Where Python's other threads compute, a question may wait 5 ms for its lock.
constexpr int64_t kMillisecondsBetween = 100;

// Of this thread and not of a call: a call may be one of many short ones.
thread_local int64_t next_question = 0;

// The coarse clock is exact to some milliseconds, and costs nanoseconds even where the exact one is a system call.
int64_t milliseconds() {
  timespec now{};
#if defined(CLOCK_MONOTONIC_COARSE)
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
#else
  clock_gettime(CLOCK_MONOTONIC, &now);
#endif
  return int64_t(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

}  // namespace

void use_question(Question question) { named_question.store(question); }

Interruption::Interruption() : float_control_(float_control()) {}

void Interruption::ask(void (*release)()) {
  if (milliseconds() < next_question || heard()) return;
  if (const Question question = named_question.load()) {
    if (release) release();
    const unsigned own = float_control();
    set_float_control(float_control_);
    answer_ = question();
    set_float_control(own);
    if (answer_) heard_.store(true, std::memory_order_release);
  }
  next_question = milliseconds() + kMillisecondsBetween;  // the answer may have taken long
}

}  // namespace defgan::cpu
