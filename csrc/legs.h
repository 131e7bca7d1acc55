// Which rows take which steps. After some steps only the best rows of each image go on: a descent is a few legs, each
// with a number of rows that is known beforehand, and between two of them every image's rows are ranked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace defgan {

// After `step` steps only `rows` rows of each image go on.
struct Keep {
  int64_t step, rows;
};

// `rows` rows of each image take the steps [begin, end).
struct Leg {
  int32_t begin, end, rows;
};

// Steps of `keep` rise and lie in [0, steps), its rows are at least 1. Where no more rows are left than are to be kept,
// nobody is dropped, and no leg ends.
inline std::vector<Leg> legs_of(int32_t steps, int32_t restarts, const std::vector<Keep>& keep) {
  std::vector<Leg> legs = {{0, steps, restarts}};
  for (const Keep& k : keep) {
    if (k.rows >= legs.back().rows) continue;
    legs.back().end = int32_t(k.step);
    legs.push_back({int32_t(k.step), steps, int32_t(k.rows)});
  }
  return legs;
}

// Whether the row `a` with its error comes before the row `b`: NaN is last, the lowest index first among equals.
// constexpr, so that kernels may call it.
constexpr bool ranks_before(float error_a, int32_t a, float error_b, int32_t b) {
  const bool nan_a = error_a != error_a, nan_b = error_b != error_b;
  if (nan_a != nan_b) return nan_b;
  return nan_a || error_a == error_b ? a < b : error_a < error_b;
}

}  // namespace defgan
