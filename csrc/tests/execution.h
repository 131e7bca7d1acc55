// What the tests of the CPU execution of kernels (csrc/cuda/execution) share: a kernel is launched once for every order
// of threads that is tried, and must pass, or fail with a message about the mistake that was planted in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/device.h"
#include "../cuda/execution/launch.h"
#include "check.h"

using namespace defgan::cuda;
using execution::Failure;
using execution::Memory;
using execution::Options;

// A sanitizer makes every launch many times slower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
// Random orders of threads that are tried beside the plain one.
constexpr uint64_t kSeeds = kSanitized ? 2 : 12;

struct Shape {
  int blocks, threads;
  size_t shared_bytes;
  bool cooperative;
};

// Returns the message of the failure, or "" where the kernel passes.
inline std::string outcome(Memory& memory, const Shape& shape, const std::function<void()>& kernel, uint64_t seed) {
  try {
    execution::launch(memory, shape.blocks, shape.threads, shape.shared_bytes, shape.cooperative, kernel,
                      Options{seed});
    return "";
  } catch (const Failure& failure) {
    return failure.what();
  }
}

// A test sets up its memory and launches, once for every order of threads. The failure's message must contain one of
// the phrases; "" stands for no failure.
inline void expect(const char* name, std::vector<std::string> phrases,
                   const std::function<std::string(uint64_t)>& run) {
  for (uint64_t seed = 0; seed <= kSeeds; ++seed) {
    const std::string message = run(seed);
    const bool as_expected = std::any_of(phrases.begin(), phrases.end(), [&](const std::string& phrase) {
      return phrase.empty() ? message.empty() : message.find(phrase) != std::string::npos;
    });
    CHECK(as_expected, "%s, seed %d: expected '%s', got '%s'", name, int(seed), phrases[0].c_str(), message.c_str());
    if (!as_expected) return;
  }
}

// The same for a kernel that needs no global memory.
inline void expect_shared(const char* name, std::vector<std::string> phrases, const Shape& shape,
                          const std::function<void()>& kernel) {
  expect(name, std::move(phrases), [&](uint64_t seed) {
    Memory memory;
    return outcome(memory, shape, kernel, seed);
  });
}

inline int report_execution(const char* subject) {
  return report((std::string(subject) + ", fibers by " + execution::fiber_implementation()).c_str());
}
