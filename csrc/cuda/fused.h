// The fused mapping: one block takes one group of 8 rows through all steps; nothing of a step leaves the multiprocessor.
// For the paper's generator (Linear, three 5x5 transposed convolutions of stride 2 over 4x4 -> 7x7 -> 14x14 -> 28x28,
// ReLU, sigmoid), whose geometry is known when this is compiled.
//
//   registers      every product's sums
//   shared memory  hidden     layer 0's output, later one phase of layer 2's output (a "plane": 49 positions whose
//                             coordinates have the same parities), later layer 0's gradient
//                  middle     layer 1's output, then its gradient
//                  masks      which of layers 0 and 2 were positive: all that the way back needs of them
//                  latents    and velocities, float32, as the last product's C fragments
//                  image      float32 sums of each pixel, then its gradient in 16 bits, in the same 32-byte slots
//   L2             weights, streamed once a step by each block, a chunk ahead of its use
//
// Layer 2's output would not fit whole (200 KB at d = 64), so it is made, used and dropped phase by phase, forward and
// (from its mask) backward. The tables' order of summation (program.cpp) is phase by phase for that reason.
#pragma once

#include "fused_convolution.h"
#include "relu_masks.h"
#include "sphere.h"

namespace defgan::cuda {

template <class S, class G>
struct Fused {
  static constexpr int kWarps = kFusedThreads / kLanes;
  static constexpr int kTiles0 = G::kC0 / 16, kTiles1 = G::kC1 / 16, kTiles2 = G::kC2 / 16;
  static constexpr int kLatentTiles = G::kLatent / 16;
  static constexpr int kStride0 = G::kChunks0 * G::kBlock, kStride1 = G::kChunks1 * G::kBlock;
  static constexpr int kPlaneGroups = 4;  // warps share a plane's positions four ways, its channels two ways
  static constexpr int kPlaneColumns = (G::kPlane + kPlaneGroups - 1) / kPlaneGroups;

  // A copy, and nothing of this object is handed to functions that are not inlined: they make their own from the
  // parameters. So all of it stays in registers and the constant bank instead of being read again from memory after
  // every store.
  const FusedParams& params;
  const FusedParams p;
  const int warp, lane;

  DEFGAN_DEVICE explicit Fused(const FusedParams& given)
      : params(given), p(given), warp(thread_index() / kLanes), lane(thread_index() % kLanes) {}

  // Not a member: the compiler must see where the pointer comes from, to use the instructions for shared memory in
  // functions that are not inlined. (Told so by an assumption about a member, it took correct paths for impossible.)
  DEFGAN_DEVICE static char* shared(int offset) { return shared_memory() + offset; }

  // Calls a member in a function of its own: inlined into the loop over steps, what each of them can compute beforehand
  // would be computed there, and occupy registers that the sums need.
  template <auto kMember, class... Arguments>
  DEFGAN_DEVICE_NOINLINE static void apart(const FusedParams& params, Arguments... arguments) {
    (Fused(params).*kMember)(arguments...);
  }

  // Rows of the tile's C fragment that this lane has: channel, and channel + 8; columns row() and row() + 1.
  DEFGAN_DEVICE int channel_of(int tile) const { return tile * 16 + lane / 4; }
  DEFGAN_DEVICE Vec2* piece(int region, int block, int tile) const {
    return reinterpret_cast<Vec2*>(shared(region + block + tile / 2 * G::kBlock + lane * 16 + tile % 2 * 8));
  }

  // relu(sums + bias), stored as the B fragment that the next product reads.
  DEFGAN_DEVICE void store_relu(int region, int block, int tile, const float* bias, const float (&c)[4]) const {
    const float low = load_constant(bias + channel_of(tile)), high = load_constant(bias + channel_of(tile) + 8);
    const auto relu = [](float x) { return activate(int(Activation::kRelu), 0.0f, x); };
    store_shared(piece(region, block, tile), Vec2{transpose_8x8(pack2<S>(relu(c[0] + low), relu(c[1] + low))),
                                                  transpose_8x8(pack2<S>(relu(c[2] + high), relu(c[3] + high)))});
  }

  // --- forward ------------------------------------------------------------------------------------------

  DEFGAN_DEVICE void linear() const {
    Vec4 z[G::kLatentChunks];
    static_for<G::kLatentChunks>([&](auto k) {
      z[k] = load_shared(reinterpret_cast<const Vec4*>(shared(G::kLatentBlocks + k * G::kBlock)) + lane);
    });
    constexpr int kPerWarp = G::kH0 * G::kH0 * kTiles0 / kWarps;
    const Vec4* fragment = reinterpret_cast<const Vec4*>(p.linear) + warp * kPerWarp * kLatentTiles * kLanes + lane;
    Vec4 next[kLatentTiles];
    static_for<kLatentTiles>([&](auto k) { next[k] = load_constant(fragment + k * kLanes); });
    DEFGAN_NO_UNROLL
    for (int t = 0; t < kPerWarp; ++t) {
      Vec4 a[kLatentTiles];
      static_for<kLatentTiles>([&](auto k) { a[k] = next[k]; });
      if (t + 1 < kPerWarp) fragment += kLatentTiles * kLanes;
      static_for<kLatentTiles>([&](auto k) { next[k] = load_constant(fragment + k * kLanes); });
      float sum[4] = {};
      static_for<G::kLatentChunks>([&](auto k) {
        multiply_accumulate<S>(sum, a[2 * k], z[k].x, z[k].y);
        multiply_accumulate<S>(sum, a[2 * k + 1], z[k].z, z[k].w);
      });
      const int position = (warp * kPerWarp + t) / kTiles0, tile = (warp * kPerWarp + t) % kTiles0;
      store_relu(G::kHidden, position * kStride0, tile, p.linear_bias + position * p.linear_bias_stride, sum);
    }
  }

  DEFGAN_DEVICE void remember_hidden() const {
    constexpr int kPairs = G::kChunks0 / 2;
    for (int i = thread_index(); i < G::kH0 * G::kH0 * kPairs * kLanes; i += kFusedThreads) {
      const Vec4* at = reinterpret_cast<const Vec4*>(shared(G::kHidden + i / kLanes * 2 * G::kBlock)) + lane;
      store_shared(reinterpret_cast<uint16_t*>(shared(G::kMask0)) + i,
                   uint16_t(mask_bits(load_shared(at)) | mask_bits(load_shared(at + kLanes)) << 8));
    }
  }

  // Where the source at (y, x) of a region lies, positions `stride` bytes apart; of the zeros beyond the region's borders.
  template <int kExtent>
  DEFGAN_DEVICE static int source_in(int region, int y, int x, int stride) {
    const int position = position_in(y, x, kExtent);
    return position == kNone ? G::kZero : region + position * stride;
  }

  template <int kPy, int kPx>
  DEFGAN_DEVICE void first_phase(int quarter) const {
    constexpr int kHigh = (G::kH1 - kPy + 1) / 2, kWide = (G::kH1 - kPx + 1) / 2, kColumns = kHigh * kWide;
    constexpr int kTiles = kTiles1 / 4;
    float sum[kColumns][kTiles][4] = {};
    convolve<S, kColumns, kTiles, G::kChunks0>(
        sum, tap_count<G>(kPy) * tap_count<G>(kPx), [](int t) { return forward_tap<G>(kPy, kPx, t); },
        [](const FusedTap& tap, auto i) {
          return source_in<G::kH0>(G::kHidden, i / kWide + tap.dy, i % kWide + tap.dx, kStride0);
        },
        p.first, kTiles1, quarter * kTiles, lane);
    static_for<kColumns>([&](auto i) {
      constexpr int kPosition = (2 * (i / kWide) + kPy) * G::kH1 + 2 * (i % kWide) + kPx;
      static_for<kTiles>(
          [&](auto m) { store_relu(G::kMiddle, kPosition * kStride1, quarter * kTiles + m, p.first_bias, sum[i][m]); });
    });
  }

  // Phases are paired so that both halves of the warps have about the same number of taps, in either alignment.
  DEFGAN_DEVICE void first() const {
    const int quarter = warp % 4;
    if (warp < 4) {
      apart<&Fused::template first_phase<0, 0>>(params, quarter);
      apart<&Fused::template first_phase<1, 1>>(params, quarter);
    } else {
      apart<&Fused::template first_phase<0, 1>>(params, quarter);
      apart<&Fused::template first_phase<1, 0>>(params, quarter);
    }
  }

  template <int kGroup>
  DEFGAN_DEVICE void plane_forward(int py, int px, int half) const {
    constexpr int kTiles = kTiles2 / 2, kSide = G::kH2 / 2;
    float sum[kPlaneColumns][kTiles][4] = {};
    convolve<S, kPlaneColumns, kTiles, G::kChunks1>(
        sum, tap_count<G>(py) * tap_count<G>(px), [&](int t) { return forward_tap<G>(py, px, t); },
        [](const FusedTap& tap, auto i) {
          constexpr int q = kGroup * kPlaneColumns + i;
          return q < G::kPlane ? source_in<G::kH1>(G::kMiddle, q / kSide + tap.dy, q % kSide + tap.dx, kStride1)
                               : G::kZero;
        },
        p.second, kTiles2, half * kTiles, lane);
    static_for<kPlaneColumns>([&](auto i) {
      constexpr int q = kGroup * kPlaneColumns + i;
      if constexpr (q < G::kPlane)
        static_for<kTiles>(
            [&](auto m) { store_relu(G::kHidden, q * G::kPlaneBytes, half * kTiles + m, p.second_bias, sum[i][m]); });
    });
  }

  // Calls body(constant group, half) for the part of a plane that is this warp's.
  template <class Body>
  DEFGAN_DEVICE void my_plane_part(const Body& body) const {
    const int half = warp % 2;
    switch (warp / 2) {
      case 0: body(std::integral_constant<int, 0>{}, half); break;
      case 1: body(std::integral_constant<int, 1>{}, half); break;
      case 2: body(std::integral_constant<int, 2>{}, half); break;
      default: body(std::integral_constant<int, 3>{}, half); break;
    }
  }

  DEFGAN_DEVICE uint16_t* plane_mask(int py, int px, int q) const {
    return reinterpret_cast<uint16_t*>(shared(G::kMask2)) + ((py * 2 + px) * G::kPlane + q) * kLanes + lane;
  }

  // A position's channels times every tap: the sums replace the channels, whose mask is kept.
  DEFGAN_DEVICE void plane_columns(int py, int px) const {
    Vec4 a[2][G::kChunks2 * 2];
    static_for<2>([&](auto m) {
      static_for<G::kChunks2 * 2>([&](auto k) {
        a[m][k] = load_constant(reinterpret_cast<const Vec4*>(p.columns) + (m * G::kChunks2 * 2 + k) * kLanes + lane);
      });
    });
    DEFGAN_NO_UNROLL
    for (int q = warp; q < G::kPlane; q += kWarps) {
      char* const at = shared(G::kHidden + q * G::kPlaneBytes);
      float sum[2][4] = {};
      uint32_t mask = 0;
      static_for<G::kChunks2>([&](auto k) {
        const Vec4 b = load_shared(reinterpret_cast<const Vec4*>(at + k * G::kBlock) + lane);
        mask |= mask_bits(b) << (8 * k);
        static_for<2>([&](auto m) { multiply_accumulate<S>(sum[m], a[m][2 * k], b.x, b.y); });
        static_for<2>([&](auto m) { multiply_accumulate<S>(sum[m], a[m][2 * k + 1], b.z, b.w); });
      });
      store_shared(plane_mask(py, px, q), uint16_t(mask));
      sync_warp();  // all lanes have read what the sums overwrite
      static_for<2>([&](auto m) {
        Float2* to = reinterpret_cast<Float2*>(at) + channel_of(m) * (kGroupRows / 2) + lane % 4;
        store_shared(to, Float2{sum[m][0], sum[m][1]});
        store_shared(to + 8 * (kGroupRows / 2), Float2{sum[m][2], sum[m][3]});
      });
    }
  }

  // Each thread has the same (pixel, pair of rows) places all the time, so the sums need no barrier between phases.
  template <class Body>
  DEFGAN_DEVICE void each_pair(const Body& body) const {
    for (int i = thread_index(); i < G::kPixels * (kGroupRows / 2); i += kFusedThreads)
      body(i / (kGroupRows / 2), i % (kGroupRows / 2));
  }
  DEFGAN_DEVICE Float2* image_sums(int pixel, int pair) const {
    return reinterpret_cast<Float2*>(shared(G::kImage + pixel * G::kSlot)) + pair;
  }

  DEFGAN_DEVICE void start_image() const {
    each_pair([&](int pixel, int pair) {
      const float bias = p.image_bias == nullptr ? 0.0f : load_constant(p.image_bias + pixel);
      store_shared(image_sums(pixel, pair), Float2{bias, bias});
    });
  }

  // Adds to each pixel what the plane's positions send it, in the order of positions. Of the taps o - 2 (2 q + parity)
  // that reach an output o along an axis there is one below 4, from the last such q, and where that is 0 also tap 4 from
  // the q before. Missing ones are zeros.
  DEFGAN_DEVICE void collect(int py, int px) const {
    constexpr int kSide = G::kH2 / 2;
    each_pair([&](int pixel, int pair) {
      const int oy = pixel / G::kH3 + G::kPad - 2 * py, ox = pixel % G::kH3 + G::kPad - 2 * px;
      Float2 sum = load_shared(image_sums(pixel, pair));
      Float2 part[2][2];
      static_for<2>([&](auto y) {
        static_for<2>([&](auto x) {
          const int qy = (oy >> 2) - 1 + y, qx = (ox >> 2) - 1 + x;
          const int ky = oy - 4 * qy, kx = ox - 4 * qx;
          const int position = ky < G::kKernel && kx < G::kKernel ? position_in(qy, qx, kSide) : kNone;
          const int at = position == kNone
                             ? G::kZero
                             : G::kHidden + position * G::kPlaneBytes + (ky * G::kKernel + kx) * (kGroupRows * 4);
          part[y][x] = load_shared(reinterpret_cast<const Float2*>(shared(at)) + pair);
        });
      });
      static_for<2>([&](auto y) {
        static_for<2>([&](auto x) {
          sum.x = sum.x + part[y][x].x;
          sum.y = sum.y + part[y][x].y;
        });
      });
      store_shared(image_sums(pixel, pair), sum);
    });
  }

  // Sums -> gradient, 16 bits, at the beginning of the same slot. The four threads of a pixel are in one warp.
  DEFGAN_DEVICE void image_to_gradient(int first_row) const {
    each_pair([&](int pixel, int pair) {
      const Float2 sum = load_shared(image_sums(pixel, pair));
      const auto gradient = [&](float value, int row) {
        return image_gradient(int(Activation::kSigmoid), 0.0f, value,
                              target_pixel(p.call, first_row + 2 * pair + row, pixel, G::kPixels));
      };
      const uint32_t word = pack2<S>(gradient(sum.x, 0), gradient(sum.y, 1));
      sync_warp();  // the pixel's other sums have been read
      store_shared(reinterpret_cast<uint32_t*>(shared(G::kImage + pixel * G::kSlot)) + pair, word);
    });
  }

  // --- backward -----------------------------------------------------------------------------------------

  // Layer 2's gradient on one plane: the image's gradient gathered tap by tap, times the columns' matrix, masked. Two
  // tiles of channels at a time: the caller's sums are in registers meanwhile.
  DEFGAN_DEVICE void plane_backward(int py, int px) const {
    constexpr int kSide = G::kH2 / 2;
    constexpr int kTiles = 2;
    constexpr int kTogether = 2;                               // positions whose loads and products overlap
    const int ky = lane / G::kKernel, kx = lane % G::kKernel;  // the column that this lane gathers
    DEFGAN_NO_UNROLL
    for (int first_tile = 0; first_tile < kTiles2; first_tile += kTiles) {
      Vec4 a[kTiles][2];
      static_for<kTiles>([&](auto m) {
        static_for<2>([&](auto k) {
          a[m][k] =
              load_constant(reinterpret_cast<const Vec4*>(p.columns_back) + ((first_tile + m) * 2 + k) * kLanes + lane);
        });
      });
      DEFGAN_NO_UNROLL
      for (int first = warp; first < G::kPlane; first += kTogether * kWarps) {
        uint32_t b[kTogether][4], mask[kTogether];
        static_for<kTogether>([&](auto n) {
          const int q = first + n * kWarps;
          if (q >= G::kPlane) return;
          const int oy = 2 * (2 * (q / kSide) + py) + ky - G::kPad, ox = 2 * (2 * (q % kSide) + px) + kx - G::kPad;
          const int pixel = lane < G::kTaps ? position_in(oy, ox, G::kH3) : kNone;
          load_matrix_transposed(b[n], shared(pixel == kNone ? G::kZero : G::kImage + pixel * G::kSlot));
          mask[n] = load_shared(plane_mask(py, px, q)) >> (4 * first_tile);
        });
        static_for<kTogether>([&](auto n) {
          const int q = first + n * kWarps;
          if (q >= G::kPlane) return;
          float sum[kTiles][4] = {};
          static_for<kTiles>([&](auto m) { multiply_accumulate<S>(sum[m], a[m][0], b[n][0], b[n][1]); });
          static_for<kTiles>([&](auto m) { multiply_accumulate<S>(sum[m], a[m][1], b[n][2], b[n][3]); });
          static_for<kTiles>([&](auto m) {
            store_masked(G::kHidden, q * G::kPlaneBytes, first_tile + m, sum[m], mask[n] >> (4 * m));
          });
        });
      }
    }
  }

  DEFGAN_DEVICE void store_masked(int region, int block, int tile, const float (&c)[4], uint32_t bits) const {
    store_shared(piece(region, block, tile), Vec2{transpose_8x8(pack2<S>(c[0], c[1])) & mask_halves(bits),
                                                  transpose_8x8(pack2<S>(c[2], c[3])) & mask_halves(bits >> 2)});
  }

  // Layer 1's gradient, a half of its channels at a time: the sums of all of them would not fit the registers.
  template <int kGroup>
  DEFGAN_DEVICE void second_backward(int half, int channels) const {
    constexpr int kTiles = kTiles1 / 4, kSide = G::kH2 / 2;
    const int first_tile = (channels * 2 + half) * kTiles;
    float sum[kPlaneColumns][kTiles][4] = {};
    DEFGAN_NO_UNROLL
    for (int phase = 0; phase < 4; ++phase) {
      const int py = phase / 2, px = phase % 2;
      plane_backward(py, px);
      sync_block();
      convolve<S, kPlaneColumns, kTiles, G::kChunks2>(
          sum, tap_count<G>(py) * tap_count<G>(px), [&](int t) { return backward_tap<G>(py, px, t); },
          [](const FusedTap& tap, auto i) {
            constexpr int q = kGroup * kPlaneColumns + i;
            return q < G::kPlane ? source_in<kSide>(G::kHidden, q / kSide + tap.dy, q % kSide + tap.dx, G::kPlaneBytes)
                                 : G::kZero;
          },
          p.second_back, kTiles1, first_tile, lane);
      sync_block();
    }
    static_for<kPlaneColumns>([&](auto i) {
      constexpr int q = kGroup * kPlaneColumns + i;
      if constexpr (q < G::kPlane)
        static_for<kTiles>([&](auto m) {
          Vec2* at = piece(G::kMiddle, q * kStride1, first_tile + m);
          const Vec2 stored = load_shared(at);
          const float (&c)[4] = sum[i][m];
          store_shared(at, Vec2{transpose_8x8(pack2<S>(c[0], c[1])) & nonzero_halves(stored.x),
                                transpose_8x8(pack2<S>(c[2], c[3])) & nonzero_halves(stored.y)});
        });
    });
  }

  // Layer 0's gradient: all 16 positions, each warp its channels, the taps phase by phase of layer 1's positions.
  DEFGAN_DEVICE void first_backward() const {
    constexpr int kTiles = kTiles0 / kWarps, kColumns = G::kH0 * G::kH0;
    float sum[kColumns][kTiles][4] = {};
    convolve<S, kColumns, kTiles, G::kChunks1>(
        sum, G::kTaps, [](int t) { return input_tap<G>(t); },
        [](const FusedTap& tap, auto i) {
          return source_in<G::kH1>(G::kMiddle, 2 * (i / G::kH0) + tap.dy, 2 * (i % G::kH0) + tap.dx, kStride1);
        },
        p.first_back, kTiles0, warp * kTiles, lane);
    static_for<kColumns>([&](auto i) {
      static_for<kTiles>([&](auto m) {
        const int tile = warp * kTiles + m, chunk = i * G::kChunks0 + tile / 2;
        const uint32_t mask =
            load_shared(reinterpret_cast<const uint16_t*>(shared(G::kMask0)) + chunk / 2 * kLanes + lane);
        store_masked(G::kHidden, i * kStride0, tile, sum[i][m], mask >> (chunk % 2 * 8 + tile % 2 * 4));
      });
    });
  }

  // The latent's gradient: one tile of 16 channels for each of the first warps, in kChains partial sums.
  DEFGAN_DEVICE void linear_backward(float (&gradient)[4]) const {
    constexpr int kSteps = G::kH0 * G::kH0 * G::kChunks0, kDepth = 4;
    const auto weights = [&](int step) {
      const int position = step / G::kChunks0, chunk = step % G::kChunks0;
      return reinterpret_cast<const Vec4*>(p.linear_back) +
             ((position * kLatentTiles + warp) * kTiles0 + chunk * 2) * kLanes + lane;
    };
    Vec4 a[kDepth][2];
    const auto load = [&](auto slot, int step) {
      a[slot][0] = load_constant(weights(step));
      a[slot][1] = load_constant(weights(step) + kLanes);
    };
    static_for<kDepth>([&](auto slot) { load(slot, slot); });
    float sum[kChains][4] = {};
    DEFGAN_NO_UNROLL
    for (int step = 0; step < kSteps; step += kDepth)
      static_for<kDepth>([&](auto slot) {
        const Vec4 b =
            load_shared(reinterpret_cast<const Vec4*>(shared(G::kHidden + (step + slot) * G::kBlock)) + lane);
        constexpr int kChain = slot % 2 * 2;
        multiply_accumulate<S>(sum[kChain], a[slot][0], b.x, b.y);
        multiply_accumulate<S>(sum[kChain + 1], a[slot][1], b.z, b.w);
        if (step + slot + kDepth < kSteps) load(slot, step + slot + kDepth);
      });
    static_for<4>([&](auto i) { gradient[i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]); });
  }

  // --- all steps ----------------------------------------------------------------------------------------

  // Each of the first warps has a tile of 16 latent channels, and number i of a lane's four is channel + 8 (i / 2), row
  // + i % 2. They are in shared memory, every lane's in a place of its own: in registers the functions above would have
  // to save them.
  DEFGAN_DEVICE Float4* own(int region) const { return reinterpret_cast<Float4*>(shared(region)) + thread_index(); }

  // As the first product's operand.
  DEFGAN_DEVICE void store_latents(const Float4& z) const {
    store_shared(own(G::kLatents), z);
    store_shared(piece(G::kLatentBlocks, 0, warp),
                 Vec2{transpose_8x8(pack2<S>(z.x, z.y)), transpose_8x8(pack2<S>(z.z, z.w))});
  }

  DEFGAN_DEVICE void start_latents(int first_row) const {
    float z[4], velocity[4];
    static_for<4>([&](auto i) {
      const int row = first_row + lane % 4 * 2 + i % 2, channel = channel_of(warp) + i / 2 * 8;
      z[i] = starting_latent(p.call, row, channel, G::kLatent);
      velocity[i] = starting_velocity(p.call, row, channel, G::kLatent);
    });
    store_latents(Float4{z[0], z[1], z[2], z[3]});
    store_shared(own(G::kVelocities), Float4{velocity[0], velocity[1], velocity[2], velocity[3]});
  }

  // Scales every row's latent to the norm of the sphere. The tiles' sums lie where layer 1's output was, which nobody
  // needs between a step's last product and the next step's second.
  DEFGAN_DEVICE void scale_latents() const {
    static_assert(kLatentTiles * 4 * sizeof(Double2) <= G::kMask0 - G::kMiddle, "the sums must fit");
    const bool mine = warp < kLatentTiles;
    const Float4 z = mine ? load_shared(own(G::kLatents)) : Float4{0, 0, 0, 0};
    const Float4 on = on_sphere<kLatentTiles>(z, p.call.descent.radius, reinterpret_cast<Double2*>(shared(G::kMiddle)));
    if (mine) store_latents(on);
  }

  DEFGAN_DEVICE void update_latents(int step) const {
    float gradient[4];
    linear_backward(gradient);
    const float rate = load_constant(p.call.descent.rates + step);
    Float4 z = load_shared(own(G::kLatents)), velocity = load_shared(own(G::kVelocities));
    momentum_step(z, velocity, gradient, p.gradient_scale, p.call.descent.momentum, rate);
    store_shared(own(G::kVelocities), velocity);
    store_latents(z);
  }

  DEFGAN_DEVICE void write(int first_row, int region, float* to) const {
    const Float4 here = load_shared(own(region));
    const float numbers[4] = {here.x, here.y, here.z, here.w};
    static_for<4>([&](auto i) {
      const int row = first_row + lane % 4 * 2 + i % 2;
      if (row < p.call.rows) store_global(to + int64_t(row) * G::kLatent + channel_of(warp) + i / 2 * 8, numbers[i]);
    });
  }

  DEFGAN_DEVICE void run() const {
    const int first_row = p.call.first_row + block_index() * kGroupRows;
    const bool has_latents = warp < kLatentTiles;
    const float radius = p.call.descent.radius;
    if (has_latents) start_latents(first_row);
    if (radius > 0 && p.call.velocities == nullptr) apart<&Fused::scale_latents>(params);
    for (int i = thread_index(); i < G::kZeroBytes / 16; i += kFusedThreads)
      store_shared(reinterpret_cast<Vec4*>(shared(G::kZero)) + i, Vec4{0, 0, 0, 0});
    for (int step = 0; step < p.call.descent.steps; ++step) {
      apart<&Fused::start_image>(params);
      sync_block();
      apart<&Fused::linear>(params);
      sync_block();
      apart<&Fused::remember_hidden>(params);
      first();
      sync_block();
      DEFGAN_NO_UNROLL
      for (int phase = 0; phase < 4; ++phase) {
        const int py = phase / 2, px = phase % 2;
        my_plane_part(
            [&](auto group, int half) { apart<&Fused::template plane_forward<group>>(params, py, px, half); });
        sync_block();
        apart<&Fused::plane_columns>(params, py, px);
        sync_block();
        apart<&Fused::collect>(params, py, px);
        sync_block();
      }
      apart<&Fused::image_to_gradient>(params, first_row);
      sync_block();
      DEFGAN_NO_UNROLL
      for (int channels = 0; channels < 2; ++channels)
        my_plane_part(
            [&](auto group, int half) { apart<&Fused::template second_backward<group>>(params, half, channels); });
      sync_block();
      apart<&Fused::first_backward>(params);
      sync_block();
      if (has_latents) apart<&Fused::update_latents>(params, step);
      if (radius > 0) apart<&Fused::scale_latents>(params);
    }
    if (has_latents) write(first_row, G::kLatents, p.call.latents);
    if (has_latents && p.call.velocities_out) write(first_row, G::kVelocities, p.call.velocities_out);
  }
};

template <class S, class G>
DEFGAN_DEVICE void fused_kernel(const FusedParams& p) {
  Fused<S, G>(p).run();
}

}  // namespace defgan::cuda
