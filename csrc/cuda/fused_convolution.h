// The transposed convolutions of the fused mapping: which taps feed the outputs of one phase, in the order of
// summation, and the product over all of them. A phase is named by the parities (py, px) of its positions' coordinates,
// since every stride is 2. Sums live in registers, sources in shared memory, weights stream from L2.
#pragma once

#include "geometries.h"
#include "layout.h"

namespace defgan::cuda {

// A weight matrix of one tap, and the step from a destination to its source.
struct FusedTap {
  int matrix, dy, dx;
};

// Taps that reach outputs of one parity, ascending: o = 2 i + k - pad with k = first, first + 2, ...
template <class G>
DEFGAN_DEVICE constexpr int first_tap(int parity) {
  return (parity + G::kPad) % 2;
}
template <class G>
DEFGAN_DEVICE constexpr int tap_count(int parity) {
  return first_tap<G>(parity) == 0 ? 3 : 2;
}

// Forward at output 2 q + parity: the source is q + (parity + pad - k) / 2.
template <class G>
DEFGAN_DEVICE FusedTap forward_tap(int py, int px, int t) {
  const int across = tap_count<G>(px), ky = first_tap<G>(py) + 2 * (t / across),
            kx = first_tap<G>(px) + 2 * (t % across);
  return {ky * G::kKernel + kx, (py + G::kPad - ky) / 2, (px + G::kPad - kx) / 2};
}
// Backward from the outputs of one phase: input i is fed by output 2 i + k - pad, the plane's i + (k - pad - parity) / 2.
template <class G>
DEFGAN_DEVICE FusedTap backward_tap(int py, int px, int t) {
  const FusedTap f = forward_tap<G>(py, px, t);
  return {f.matrix, -f.dy, -f.dx};
}
// Backward from all outputs, the taps of one phase after the other: input i is fed by output 2 i + k - pad.
template <class G>
DEFGAN_DEVICE FusedTap input_tap(int t) {
  int py = 0, px = 0;
  for (int phase = 0; phase < 3; ++phase) {
    const int count = tap_count<G>(phase / 2) * tap_count<G>(phase % 2);
    if (t < count) break;
    t -= count;
    py = (phase + 1) / 2, px = (phase + 1) % 2;
  }
  const int across = tap_count<G>(px), ky = first_tap<G>(py) + 2 * (t / across),
            kx = first_tap<G>(px) + 2 * (t % across);
  return {ky * G::kKernel + kx, ky - G::kPad, kx - G::kPad};
}

// The number of the position at (y, x) of a square map, kNone outside of it.
DEFGAN_DEVICE int position_in(int y, int x, int extent) {
  return unsigned(y) < unsigned(extent) && unsigned(x) < unsigned(extent) ? y * extent + x : kNone;
}

// sum[column][tile] += W[tap] * source for every tap. source_at(tap, column): offset of the source in shared memory, of
// zeros where there is none, since a product costs less than a branch. Two columns' products take turns, so that no sum
// waits for itself, while the next two columns' operands are on their way. Weights come as a stream, one chunk of 32
// source channels ahead, through the ends of taps.
template <class S, int kColumns, int kTiles, int kChunks, class TapAt, class SourceAt>
DEFGAN_DEVICE void convolve(float (&sum)[kColumns][kTiles][4], int taps, const TapAt& tap_at, const SourceAt& source_at,
                            const char* weights, int row_tiles, int first_tile, int lane) {
  constexpr int kColumnTiles = kChunks * 2;
  // Two chunks at a time save copying registers, where the sums leave enough of them.
  constexpr int kBatches = (kColumns + 1) / 2, kUnrolled = kChunks % 2 == 0 && kColumns * kTiles < 32 ? 2 : 1;
  const auto matrix = [&](int t) {
    return reinterpret_cast<const Vec4*>(weights) +
           (tap_at(t).matrix * row_tiles + first_tile) * kColumnTiles * kLanes + lane;
  };
  Vec4 a[2][kTiles][2];
  const auto load = [&](auto slot, const Vec4* at) {
    static_for<kTiles>([&](auto m) {
      a[slot][m][0] = load_constant(at + m * kColumnTiles * kLanes);
      a[slot][m][1] = load_constant(at + m * kColumnTiles * kLanes + kLanes);
    });
  };
  const Vec4* here = matrix(0);
  load(std::integral_constant<int, 0>{}, here);
  DEFGAN_NO_UNROLL
  for (int t = 0; t < taps; ++t) {
    const Vec4* following = t + 1 < taps ? matrix(t + 1) : here;
    const FusedTap tap = tap_at(t);
    int source[kColumns];
    static_for<kColumns>([&](auto i) { source[i] = source_at(tap, i) + lane * 16; });
    DEFGAN_NO_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk += kUnrolled) {
      static_for<kUnrolled>([&](auto step) {
        constexpr int kSlot = kUnrolled == 2 ? step : 0;
        here += 2 * kLanes;
        load(std::integral_constant<int, 1 - kSlot>{}, chunk + step + 1 < kChunks ? here : following);
        Vec4 b[2][2];
        const auto fetch = [&](auto batch) {
          static_for<2>([&](auto i) {
            if constexpr (batch * 2 + i < kColumns)
              b[batch % 2][i] = load_shared(reinterpret_cast<const Vec4*>(shared_memory() + source[batch * 2 + i] +
                                                                          step * Storage<S>::kBlockBytes));
          });
        };
        fetch(std::integral_constant<int, 0>{});
        static_for<kBatches>([&](auto batch) {
          constexpr int kFirst = batch * 2, kCount = kColumns - kFirst < 2 ? kColumns - kFirst : 2;
          fetch(std::integral_constant<int, batch + 1>{});
          static_for<kCount>([&](auto i) {
            static_for<kTiles>([&](auto m) {
              multiply_accumulate<S>(sum[kFirst + i][m], a[kSlot][m][0], b[batch % 2][i].x, b[batch % 2][i].y);
            });
          });
          static_for<kCount>([&](auto i) {
            static_for<kTiles>([&](auto m) {
              multiply_accumulate<S>(sum[kFirst + i][m], a[kSlot][m][1], b[batch % 2][i].z, b[batch % 2][i].w);
            });
          });
        });
        if constexpr (kUnrolled == 1) {
          static_for<kTiles>([&](auto m) { a[0][m][0] = a[1][m][0], a[0][m][1] = a[1][m][1]; });
        }
      });
      static_for<kColumns>([&](auto i) { source[i] += kUnrolled * Storage<S>::kBlockBytes; });
    }
    here = following;
  }
}

}  // namespace defgan::cuda
