// How a call's rows are cut into groups and shared by teams of threads.
#pragma once

#include "packed_generator.h"

namespace defgan::cpu {

// With many rows every thread is a team of its own and nobody waits; few rows are shared by a larger team, layer by
// layer, with a barrier between. Results do not depend on the division.
struct Division {
  int teams = 1;
  int64_t groups = 0;
  int group_rows = 1;  // of the largest group
};

// max_rows: rows in flight at most; 0: as many as keep working memory under 200 MB.
Division divide(const PackedGenerator& generator, int64_t rows, int threads, int64_t max_rows);

}  // namespace defgan::cpu
