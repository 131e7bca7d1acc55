// Threads of one call: those of a pool that the process has anyway, where one was named (torch's), else threads that are
// started for the call and joined before it returns, which takes microseconds of a projection's milliseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

#include "interruption.h"

namespace defgan::cpu {

// All threads of a team meet here, several times a step. Spins, since a step's layers last tens of
// microseconds; yields after a while, and at once where all calls together have more threads than there are cores.
class Barrier {
 public:
  explicit Barrier(int size = 1) : size_(size) {}
  void wait();

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0};
};

struct Range {
  int64_t begin, end;
};

// One thread of a team. Of every layer's work it takes the id-th of `size` shares.
struct Member {
  int id = 0, size = 1;
  Barrier* barrier = nullptr;
  void meet() const {
    if (size > 1) barrier->wait();
  }
  // The id-th share of [0, total), in multiples of `grain` but for the last.
  Range share(int64_t total, int64_t grain = 1) const {
    const int64_t grains = (total + grain - 1) / grain;
    const auto cut = [&](int64_t i) { return grains * i / size * grain < total ? grains * i / size * grain : total; };
    return {cut(id), cut(id + 1)};
  }
};

// Threads that a call may use: `wanted`, less those that other calls are using at this moment (several
// projections may run in a caller's own thread pool), at least one. Results do not depend on the number.
class Lease {
 public:
  explicit Lease(int wanted);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  int threads() const { return threads_; }

 private:
  int threads_;
};

// Runs body(0) .. body(threads - 1) at the same time on a pool's threads, or nothing at all and returns false.
using Pool = bool (*)(int threads, const std::function<void(int)>& body);

// From now on teams take the pool's threads wherever it gives them.
void use_pool(Pool pool);

// Threads that can run at the same time: as many as there are cores, by default those of the first call's affinity.
void set_cores(int cores);

// Runs body(0) .. body(threads - 1), all at the same time, body(0) on the calling thread. body must not throw.
void run_threads(int threads, const std::function<void(int)>& body);

// The same for long work. The calling thread goes on asking for an interruption until all are done; body ends early where
// one was heard, and what it says is thrown here.
void run_threads(int threads, Interruption& interruption, const std::function<void(int)>& body);

// What the process's calls have done so far, for tests.
struct ThreadCounts {
  int64_t busy;    // threads of all calls together, now
  int64_t most;    // the most that there were
  int64_t yields;  // by threads that waited for their team
};
ThreadCounts thread_counts();

}  // namespace defgan::cpu
