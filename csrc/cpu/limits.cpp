#include "limits.h"

#include <chrono>

#include "team.h"

namespace defgan::cpu {

double multiply_add_limit(const InstructionSet& set, Precision precision, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const KernelTable& table = precision == Precision::kBfloat16 ? *set.bfloat16 : *set.float32;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  constexpr int64_t kRounds = 100000;
  table.multiply_adds(kRounds);  // wakes the wide units up
  std::vector<double> rates(size_t(threads), 0.0);
  Barrier barrier(threads);
  run_threads(threads, [&](int id) {
    barrier.wait();
    const auto start = Clock::now();
    double work = 0;
    do work += table.multiply_adds(kRounds);
    while (since(start) < seconds);
    rates[size_t(id)] = work / since(start);
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace defgan::cpu
