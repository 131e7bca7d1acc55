#include "division.h"

#include <algorithm>

#include "workspace.h"

namespace defgan::cpu {
namespace {

constexpr int64_t kWorkingMemory = 200 << 20;
// Beyond it a group is one tile of rows, not two: activations that leave the caches cost more than the second tile's
// use of the same weights gains (64x64 images: with AVX2 72% of the peak at 12 rows, 14 MB, and 77% at 6; with AMX 32
// rows take 2.2 times as long as 16).
constexpr int64_t kGroupMemory = 8 << 20;

// Rows of a group at most: as many as fill the registers, twice that where the weights of a tile are used by few rows
// and activations are small.
int most_rows(const PackedGenerator& g) {
  const KernelTable& table = *g.table();
  const int tile = table.tile_registers ? table.max_rows[kOnePanel] / 2 : table.max_rows[kOnePanel];
  const bool many_rows = tile >= 12 && !table.tile_registers;
  return many_rows || 2 * tile * row_bytes(g) > kGroupMemory ? tile : 2 * tile;
}

// The most rows, `most` at most and one at least, whose workspace fits.
int rows_that_fit(const PackedGenerator& g, int most, int64_t bytes) {
  int fit = 1;
  if (workspace_bytes(g, most) <= bytes) return most;
  while (most - fit > 1) {
    const int middle = (fit + most) / 2;
    (workspace_bytes(g, middle) <= bytes ? fit : most) = middle;
  }
  return fit;
}

// Rough relative speed of a group of so many rows in one thread: short tiles leave the multiply-add units idle; where
// tiles are registers of their own, the weights' way to them costs as much as another row.
double speed(const KernelTable& table, int64_t rows) {
  if (table.tile_registers) return double(rows) / double(rows + 1);
  return rows >= 5 ? 1.0 : rows == 4 ? 0.95 : rows == 3 ? 0.9 : 0.8;
}

}  // namespace

Division divide(const PackedGenerator& g, int64_t rows, int threads, int64_t max_rows) {
  const int most = most_rows(g);
  Division best;
  double best_time = 0;
  for (int teams = 1; teams <= threads; ++teams) {
    if (threads % teams != 0 && teams != threads) continue;
    int64_t limit = rows_that_fit(g, most, kWorkingMemory / teams);
    if (max_rows > 0) {
      if (max_rows < teams) break;
      limit = std::min<int64_t>(limit, max_rows / teams);
    }
    const int64_t each = (rows + teams - 1) / teams;
    const int64_t count = (each + limit - 1) / limit;
    const int64_t group = (each + count - 1) / count;
    const int size = threads / teams;
    const double time = double(each) / speed(*g.table(), group) / (size * (size > 1 ? 0.93 : 1.0));
    if (teams == 1 || time < best_time * 0.999) {
      best_time = time;
      best.teams = teams;
      best.groups = std::min<int64_t>(count * teams, rows);
      best.group_rows = int((rows + best.groups - 1) / best.groups);
    }
  }
  return best;
}

}  // namespace defgan::cpu
