#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <vector>

#include "cores.h"

namespace defgan::cpu {
namespace {

constexpr int kSpins = 1000;  // tens of microseconds

std::atomic<int> busy{0};
std::atomic<int> cores{0};  // 0: nobody has asked yet
std::atomic<int> most_busy{0};
std::atomic<int64_t> all_yields{0};

std::atomic<Pool> named_pool{nullptr};

// A child has none of the threads that its parent was using when it forked.
const int forget_on_fork = pthread_atfork(nullptr, nullptr, [] { busy.store(0); });

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The threads of a call but the calling one, which waits for them when its own part is done.
class Others {
 public:
  explicit Others(int count) : left_(count) {}

  void one_is_done() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (--left_ == 0) all_done_.notify_one();
  }

  void wait(Interruption& interruption) {
    // A team's members end together.
    for (int spins = 0; spins < kSpins; ++spins) {
      if (left_.load(std::memory_order_relaxed) == 0) break;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!all_done_.wait_for(lock, std::chrono::milliseconds(50), [&] { return left_.load() == 0; })) {
      lock.unlock();
      interruption.ask();
      lock.lock();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::atomic<int> left_;
};

}  // namespace

void Barrier::wait() {
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  const int patience = busy.load(std::memory_order_relaxed) > cores.load(std::memory_order_relaxed) ? 0 : kSpins;
  int64_t waits = 0;
  for (; round_.load(std::memory_order_acquire) == round; ++waits) {
    if (waits < patience)
      relax();
    else
      std::this_thread::yield();
  }
  if (waits > patience) all_yields.fetch_add(waits - patience, std::memory_order_relaxed);
}

Lease::Lease(int wanted) {
  if (cores.load() == 0) cores.store(cores_of_affinity());
  int before = busy.load();
  do {
    threads_ = std::max(1, wanted - std::max(0, before));
  } while (!busy.compare_exchange_weak(before, before + threads_));
  int most = most_busy.load();
  while (most < before + threads_ && !most_busy.compare_exchange_weak(most, before + threads_)) {
  }
}

Lease::~Lease() { busy.fetch_sub(threads_); }

void use_pool(Pool pool) { named_pool.store(pool); }

void set_cores(int count) { cores.store(count); }

ThreadCounts thread_counts() { return {busy.load(), most_busy.load(), all_yields.load()}; }

void run_threads(int threads, Interruption& interruption, const std::function<void(int)>& body) {
  Others others(threads - 1);
  run_threads(threads, [&](int id) {
    body(id);
    id == 0 ? others.wait(interruption) : others.one_is_done();
  });
  interruption.rethrow();
}

void run_threads(int threads, const std::function<void(int)>& body) {
  if (threads == 1) return body(0);
  const Pool pool = named_pool.load();
  if (pool && pool(threads, body)) return;
  // Nobody starts before all exist: a team whose member could not be started would wait for it for ever.
  std::mutex mutex;
  std::condition_variable decided;
  int go = 0;  // 1: start, -1: give up
  std::vector<std::thread> others;
  const auto decide = [&](int value) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      go = value;
    }
    decided.notify_all();
  };
  try {
    for (int id = 1; id < threads; ++id)
      others.emplace_back([&, id] {
        {
          std::unique_lock<std::mutex> lock(mutex);
          decided.wait(lock, [&] { return go != 0; });
          if (go < 0) return;
        }
        body(id);
      });
  } catch (const std::system_error&) {
    decide(-1);
    for (std::thread& thread : others) thread.join();
    throw;
  }
  decide(1);
  body(0);
  for (std::thread& thread : others) thread.join();
}

}  // namespace defgan::cpu
