#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <vector>

namespace defgan::cpu {
namespace {

std::atomic<int> busy{0};

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

}  // namespace

void Barrier::wait() {
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < 1000)
      relax();
    else
      std::this_thread::yield();
  }
}

Lease::Lease(int wanted) {
  int before = busy.load();
  do {
    threads_ = std::max(1, wanted - std::max(0, before));
  } while (!busy.compare_exchange_weak(before, before + threads_));
}

Lease::~Lease() { busy.fetch_sub(threads_); }

void use_pool(Pool pool) { named_pool.store(pool); }

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
