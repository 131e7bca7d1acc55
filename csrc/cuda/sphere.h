// Latents on a sphere: the sums of their squares, in one order in every mapping.
#pragma once

#include "layout.h"

namespace defgan::cuda {

// Sums over the channels of a tile of 16, for two rows.
struct alignas(16) Double2 {
  double x, y;
};

// The sums of a tile's squares. z: what this lane has of it as a C fragment, channels lane / 4 and 8 more (z[2], z[3]) of
// the rows 2 (lane % 4) and one more; every lane gets the sums of its own two rows. A row's norm is the root of its
// tiles' sums, added in order: the same bits in every mapping. In double they neither overflow nor vanish.
DEFGAN_DEVICE Double2 squares_of_tile(const float (&z)[4]) {
  const auto square = [](float x) { return double(x) * double(x); };
  Double2 sum{square(z[0]) + square(z[2]), square(z[1]) + square(z[3])};
  for (int mask = 4; mask < kLanes; mask *= 2) {
    sum.x += shuffle_xor(sum.x, mask);
    sum.y += shuffle_xor(sum.y, mask);
  }
  return sum;
}

// What scales a row with that sum of squares to the norm `radius`; a row of norm zero stays.
DEFGAN_DEVICE double scale_to(float radius, double squares) {
  return squares == 0 ? 1.0 : double(radius) / square_root(squares);
}
DEFGAN_DEVICE float scaled(float z, double scale) { return float(double(z) * scale); }

// The same for a block whose warps have a tile each, the first kTiles of them: z scaled to the norm `radius`. All threads
// of the block call it. sums: in shared memory, kTiles times four.
template <int kTiles>
DEFGAN_DEVICE Float4 on_sphere(const Float4& z, float radius, Double2* sums) {
  const int warp = thread_index() / kLanes, lane = thread_index() % kLanes;
  if (warp < kTiles) {
    const Double2 sum = squares_of_tile({z.x, z.y, z.z, z.w});
    if (lane < 4) store_shared(sums + warp * 4 + lane, sum);
  }
  sync_block();
  if (warp >= kTiles) return z;
  Double2 total{0, 0};
  static_for<kTiles>([&](auto tile) {
    const Double2 sum = load_shared(sums + tile * 4 + lane % 4);
    total.x += sum.x;
    total.y += sum.y;
  });
  const double low = scale_to(radius, total.x), high = scale_to(radius, total.y);
  return Float4{scaled(z.x, low), scaled(z.y, high), scaled(z.z, low), scaled(z.w, high)};
}

}  // namespace defgan::cuda
