// Matrix products of the layered and split mappings: one warp takes a tile of destination channels by some (position,
// group) columns of 8 rows through all taps, operands straight from L2 into registers.
//
//   sum[channel][position, row] = sum over taps of W[matrix of the tap][channel][:] * source[position of the tap][row][:]
//
// In 16 bits weights are A fragments and activations B fragments, both stored as lanes hold them (layout.h), so a load is
// 16 bytes a lane and 512 contiguous bytes a warp, straight into registers. Loads go through L1, since the warps of a
// block share operands; the team's barrier makes what other multiprocessors wrote visible.
// The order of summation is the tables': taps in order, channels ascending, one accumulator, or kChains of them taken in
// turn by 16 channels and added pairwise at the end.
#pragma once

#include "layout.h"

namespace defgan::cuda {

// A stage of products as one team sees it. Header and stage are in shared memory, where they cost no registers.
struct Product {
  int slot;  // of the stage in shared memory
  const int32_t* index;
  const PositionClass* classes;  // the stage's
  const char* weights;           // the stage's
  const float* vectors;
  char* groups;         // buffers of the team's first group
  int32_t group_count;  // of the team
  float momentum, rate;
};

DEFGAN_DEVICE TeamTables* team_tables() { return reinterpret_cast<TeamTables*>(shared_memory()); }
DEFGAN_DEVICE const Header& header() { return view_shared(&team_tables()->header); }
DEFGAN_DEVICE const Stage& stage_in(int slot) { return view_shared(&team_tables()->stages[slot].stage); }
DEFGAN_DEVICE PositionClass class_of(const Product& p, int number) {
  return number < kStagedClasses ? load_shared_table(&team_tables()->stages[p.slot].classes[number])
                                 : load_table<PositionClass>(reinterpret_cast<const char*>(p.classes + number));
}

// Column `number` of a class. Columns are numbered position by position, groups innermost; neighbouring tiles have the
// same weights, which L1 then serves to the warps of a block.
struct Column {
  int position;  // within its class; the class's number of positions stands for "no column"
  int group;

  DEFGAN_DEVICE Column(const PositionClass& c, int group_count, int number) {
    const int at = group_count == 1 ? number : number / group_count;
    position = at < c.positions ? at : c.positions;
    group = number - at * group_count;
  }
};

// Sums of rows 16 tile + lane / 4 (c[0], c[1]) and 8 more (c[2], c[3]) for rows 2 (lane % 4) and one more of a group.
template <class S>
DEFGAN_DEVICE void finish_fragment(const Product& p, int tile, int position, int group, int lane, float c0, float c1,
                                   float c2, float c3) {
  const Stage& s = stage_in(p.slot);
  const Header& h = header();
  char* const buffers = p.groups + int64_t(group) * h.group_bytes;
  const int channel = tile * 16 + lane / 4, pair = lane % 4;
  if (s.epilogue == Epilogue::kSums) {
    Float2* sums = reinterpret_cast<Float2*>(buffers + s.destination) +
                   (int64_t(position) * s.destination_chunks * kChunk + channel) * (kGroupRows / 2) + pair;
    store_global(sums, Float2{c0, c1});
    store_global(sums + 8 * (kGroupRows / 2), Float2{c2, c3});
    return;
  }
  char* const block =
      buffers + s.destination + (int64_t(position) * s.destination_chunks + tile / 2) * Storage<S>::kBlockBytes;
  Vec2* const piece = reinterpret_cast<Vec2*>(block + lane * 16 + tile % 2 * 8);
  float v[4] = {c0, c1, c2, c3};
  if (s.epilogue == Epilogue::kActivate) {
    const float* bias = p.vectors + s.bias + int64_t(position) * s.bias_stride + channel;
    const float low = load_constant(bias), high = load_constant(bias + 8);
    v[0] = activate(s.activation, s.slope, v[0] + low);
    v[1] = activate(s.activation, s.slope, v[1] + low);
    v[2] = activate(s.activation, s.slope, v[2] + high);
    v[3] = activate(s.activation, s.slope, v[3] + high);
  } else if (s.epilogue == Epilogue::kGradient) {
    const Vec2 stored = load_global(piece);
    float y[4];
    unpack2<S>(transpose_8x8(stored.x), y[0], y[1]);
    unpack2<S>(transpose_8x8(stored.y), y[2], y[3]);
    static_for<4>([&](auto i) { v[i] = differentiate(s.activation, s.slope, y[i], v[i]); });
  } else {
    static_for<2>([&](auto half) {
      const int k = channel + half * 8;
      if (k < h.latent_size) {
        const int64_t at = int64_t(k) * (kGroupRows / 2) + pair;
        Float2* const latents = reinterpret_cast<Float2*>(buffers + h.latent) + at;
        Float2* const velocities = reinterpret_cast<Float2*>(buffers + h.velocity) + at;
        Float2 z = load_global(latents), velocity = load_global(velocities);
        momentum_step(z.x, velocity.x, v[2 * half], h.gradient_scale, p.momentum, p.rate);
        momentum_step(z.y, velocity.y, v[2 * half + 1], h.gradient_scale, p.momentum, p.rate);
        store_global(latents, z);
        store_global(velocities, velocity);
        v[2 * half] = z.x;
        v[2 * half + 1] = z.y;
      } else {
        v[2 * half] = v[2 * half + 1] = 0.0f;
      }
    });
    sync_warp();  // the lanes' paths differed, and the transposition wants them together
  }
  const uint32_t low = transpose_8x8(pack2<S>(v[0], v[1])), high = transpose_8x8(pack2<S>(v[2], v[3]));
  store_global(piece, Vec2{low, high});
}

// A tile of kTiles x 16 channels by kColumns columns. kAtOnce steps (32 source channels each) are loaded, then multiplied:
// L2's latency is paid once for all of them. A ring with loads ahead of the products does no better, since the compiler
// lets all loads in a loop share one scoreboard, so that waiting for the oldest is waiting for the newest; nor does a ring
// in shared memory, whose copies cost more instructions than there is work.
template <class S, int kTiles, int kColumns, int kAtOnce, int kChainCount>
struct TensorTile {
  static_assert(kChainCount == 1 || (kChainCount == 4 && kAtOnce % 2 == 0), "a step holds two of four chains");
  static constexpr int kChannels = kTiles * 16;
  static constexpr int kWidth = kColumns;
  // Of one step: its operands, and about how many clocks a warp takes for it that has its scheduler for itself: its share
  // of L2's latency, and its products (8 clocks each, 33 between two of one sum).
  static constexpr int kStepBytes = (kTiles * 2 + kColumns) * Storage<S>::kBlockBytes;
  static constexpr int kStepClocks = 700 / kAtOnce + (kTiles * kColumns * 16 > 66 ? kTiles * kColumns * 16 : 66);

  DEFGAN_DEVICE static void run(const Product& p, int number, int block, int first, int lane) {
    const PositionClass c = class_of(p, number);
    int position[kColumns];  // needed last, and asked for first: it comes from L2
    static_for<kColumns>([&](auto i) {
      const Column column(c, p.group_count, first + i);
      position[i] = column.position < c.positions ? load_constant(p.index + c.position + column.position) : kNone;
    });
    float sum[kColumns][kTiles][kChainCount][4] = {};
    for (int tap = 0; tap < c.taps; tap += kLanes) accumulate(p, c, tap, block * kTiles, first, lane, sum);
    static_for<kColumns>([&](auto i) {
      const Column column(c, p.group_count, first + i);
      if (position[i] == kNone) return;
      static_for<kTiles>([&](auto m) {
        float total[4];
        static_for<4>([&](auto j) {
          if constexpr (kChainCount == 1)
            total[j] = sum[i][m][0][j];
          else
            total[j] = (sum[i][m][0][j] + sum[i][m][1][j]) + (sum[i][m][2][j] + sum[i][m][3][j]);
        });
        finish_fragment<S>(p, block * kTiles + m, position[i], column.group, lane, total[0], total[1], total[2],
                           total[3]);
      });
    });
  }

  // Taps first_tap to first_tap + 31, as far as there are so many.
  DEFGAN_DEVICE static void accumulate(const Product& p, const PositionClass& c, int first_tap, int first_tile,
                                       int first, int lane, float (&sum)[kColumns][kTiles][kChainCount][4]) {
    constexpr int kFragment = Storage<S>::kFragmentBytes, kUnits = Storage<S>::kBlockBytes / kSourceUnit;
    const Stage& s = stage_in(p.slot);
    const int chunks = s.source_chunks, tile_bytes = chunks * 2 * kFragment;
    const int matrix_bytes = s.destination_chunks * 2 * tile_bytes;
    const int taps = c.taps - first_tap < kLanes ? c.taps - first_tap : kLanes;
    const int steps = taps * chunks;
    const char* const weights = p.weights + first_tile * tile_bytes + lane * 16;

    // Each lane has one tap's matrix and sources: one wait for memory for the tables of all.
    const char* buffers[kColumns];
    int matrix = 0, source[kColumns] = {};
    if (lane < taps) matrix = load_constant(p.index + c.matrix + first_tap + lane);
    static_for<kColumns>([&](auto i) {
      const Column at(c, p.group_count, first + i);
      const bool real = at.position < c.positions;  // what is no column computes anything, and drops it
      buffers[i] = p.groups + (real ? at.group : 0) * header().group_bytes + lane * 16;
      if (lane < taps)
        source[i] = load_constant(p.index + c.source + (first_tap + lane) * c.positions + (real ? at.position : 0));
    });
    sync_warp();

    int tap = 0, chunk = 0;  // of the step to load next
    DEFGAN_NO_UNROLL
    for (int step = 0; step < steps; step += kAtOnce) {
      Vec4 a[kAtOnce][kTiles][2], b[kAtOnce][kColumns];
      static_for<kAtOnce>([&](auto n) {
        const char* const fragments =
            weights + int64_t(shuffle_from(matrix, tap)) * matrix_bytes + chunk * 2 * kFragment;
        static_for<kTiles>([&](auto m) {
          const Vec4* const at = reinterpret_cast<const Vec4*>(fragments + m * tile_bytes);
          a[n][m][0] = load_constant(at);
          a[n][m][1] = load_constant(at + kLanes);
        });
        static_for<kColumns>([&](auto i) {
          const int unit = shuffle_from(source[i], tap) + chunk * kUnits;
          b[n][i] = load_global(reinterpret_cast<const Vec4*>(buffers[i] + int64_t(unit) * kSourceUnit));
        });
        // Past the last step it is loaded again: cheaper than asking.
        const bool more = step + n + 1 < steps, ends = chunk + 1 == chunks;
        tap = more && ends ? tap + 1 : tap;
        chunk = !more ? chunk : ends ? 0 : chunk + 1;
      });
      static_for<kAtOnce>([&](auto n) {
        if (step + n >= steps) return;
        constexpr int kFirst = kChainCount == 1 ? 0 : n % 2 * 2, kSecond = kChainCount == 1 ? 0 : kFirst + 1;
        // All columns' first halves, then the second ones: neighbouring products are of different sums.
        static_for<kColumns>([&](auto i) {
          static_for<kTiles>(
              [&](auto m) { multiply_accumulate<S>(sum[i][m][kFirst], a[n][m][0], b[n][i].x, b[n][i].y); });
        });
        static_for<kColumns>([&](auto i) {
          static_for<kTiles>(
              [&](auto m) { multiply_accumulate<S>(sum[i][m][kSecond], a[n][m][1], b[n][i].z, b[n][i].w); });
        });
      });
    }
  }
};

// Float32 on the ordinary units, fused multiply-adds, one chain: a lane's sums of kLaneChannels channels by the 8
// rows of one column.
template <int kLaneChannels>
struct ScalarSums {
  float sum[kLaneChannels][kGroupRows] = {};

  // One source channel: its weights and its 8 rows.
  DEFGAN_DEVICE void add(const float (&w)[kLaneChannels], const Float4& low, const Float4& high) {
    const float x[kGroupRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    static_for<kLaneChannels>([&](auto n) {
      static_for<kGroupRows>([&](auto j) { sum[n][j] = fused_multiply_add(w[n], x[j], sum[n][j]); });
    });
  }

  DEFGAN_DEVICE void finish(const Product& p, int position, int group, int first_channel) {
    const Stage& s = stage_in(p.slot);
    char* const buffers = p.groups + int64_t(group) * header().group_bytes;
    static_for<kLaneChannels>([&](auto n) {
      const int channel = first_channel + n, line = channel % kChunk;
      char* const at = buffers + s.destination +
                       (int64_t(position) * s.destination_chunks + channel / kChunk) * Storage<float>::kBlockBytes;
      float (&v)[kGroupRows] = sum[n];
      if (s.epilogue == Epilogue::kActivate) {
        const float bias = load_constant(p.vectors + s.bias + int64_t(position) * s.bias_stride + channel);
        static_for<kGroupRows>([&](auto j) { v[j] = activate(s.activation, s.slope, v[j] + bias); });
      } else if (s.epilogue == Epilogue::kGradient) {
        float y[kGroupRows];
        Storage<float>::load(at, line, y);
        static_for<kGroupRows>([&](auto j) { v[j] = differentiate(s.activation, s.slope, y[j], v[j]); });
      } else if (s.epilogue == Epilogue::kUpdate) {
        update_line(p, buffers, channel, v);
      }
      Storage<float>::store(at, line, v);
    });
  }

  // v: the gradient of one channel of the latent in, the new latent out.
  DEFGAN_DEVICE static void update_line(const Product& p, char* buffers, int channel, float (&v)[kGroupRows]) {
    const Header& h = header();
    if (channel >= h.latent_size) {
      static_for<kGroupRows>([&](auto j) { v[j] = 0.0f; });
      return;
    }
    char* const latents = buffers + h.latent;
    char* const velocities = buffers + h.velocity;
    float z[kGroupRows], velocity[kGroupRows];
    Storage<float>::load(latents, channel, z);
    Storage<float>::load(velocities, channel, velocity);
    static_for<kGroupRows>([&](auto j) {
      momentum_step(z[j], velocity[j], v[j], h.gradient_scale, p.momentum, p.rate);
      v[j] = z[j];
    });
    Storage<float>::store(latents, channel, z);
    Storage<float>::store(velocities, channel, velocity);
  }
};

// 32 channels by kLaneColumns columns. With one column a lane has one channel of it: many small tiles, for few rows.
// With eight, four lanes share a column, 8 channels each: four times the products for each number loaded.
template <int kLaneColumns>
struct ScalarTile {
  static_assert(kLaneColumns == 1 || kLaneColumns == 8);
  static constexpr int kChannels = kChunk;
  static constexpr int kWidth = kLaneColumns;
  static constexpr int kLaneChannels = kLaneColumns;  // lanes of a column: 32 / kLaneColumns
  // Of one source channel: operands, and the products' time in clocks.
  static constexpr int kStepBytes = (kChannels + kLaneColumns * kGroupRows) * 4;
  static constexpr int kStepClocks = kLaneChannels * kGroupRows;
  // Source channels that are loaded at a time, while those before them are multiplied. Both tiles take as many channels,
  // padded with zeros, so that bits agree even where a product with a zero is not one (0 times infinity).
  static constexpr int kUnit = kLaneColumns == 1 ? 8 : 2, kPadded = 16;

  DEFGAN_DEVICE static void run(const Product& p, int number, int block, int first, int lane) {
    const PositionClass c = class_of(p, number);
    constexpr int kColumnLanes = kLanes / kLaneColumns;
    const int channel = lane % kColumnLanes * kLaneChannels;
    const Column at(c, p.group_count, first + lane / kColumnLanes);
    const bool real = at.position < c.positions;  // what is no column computes anything, and drops it
    ScalarSums<kLaneChannels> sums;
    accumulate(p, c, block, real ? at.position : 0, real ? at.group : 0, channel, sums);
    if (real) sums.finish(p, load_constant(p.index + c.position + at.position), at.group, block * kChunk + channel);
  }

  struct Operands {
    float w[kUnit][kLaneChannels];
    Float4 x[kUnit][2];

    DEFGAN_DEVICE void load(const char* weights, const char* source) {
      static_for<kUnit>([&](auto k) {
        const char* const line = weights + k * (kChunk * 4);
        if constexpr (kLaneChannels == 1) {
          w[k][0] = load_constant(reinterpret_cast<const float*>(line));
        } else {
          static_for<kLaneChannels / 4>([&](auto q) {
            const Float4 four = load_constant(reinterpret_cast<const Float4*>(line) + q);
            w[k][4 * q] = four.x, w[k][4 * q + 1] = four.y, w[k][4 * q + 2] = four.z, w[k][4 * q + 3] = four.w;
          });
        }
        static_for<2>([&](auto half) {
          x[k][half] = load_global(reinterpret_cast<const Float4*>(source + k * (kGroupRows * 4)) + half);
        });
      });
    }
  };

  DEFGAN_DEVICE static void accumulate(const Product& p, const PositionClass& c, int block, int place, int group,
                                       int channel, ScalarSums<kLaneChannels>& sums) {
    if (c.taps == 0) return;  // positions that nothing reaches
    constexpr int kWeightStep = kUnit * kChunk * 4, kSourceStep = kUnit * kGroupRows * 4;
    const Stage& s = stage_in(p.slot);
    const int units = (s.source_channels + kPadded - 1) / kPadded * (kPadded / kUnit);
    const int64_t block_bytes = int64_t(s.source_chunks) * kChunk * kChunk * 4;
    const char* const first = p.weights + block * block_bytes + channel * 4;
    const char* const buffers = p.groups + group * header().group_bytes;
    const auto weights_of = [&](int tap) {
      return first + load_constant(p.index + c.matrix + tap) * (s.destination_chunks * block_bytes);
    };
    const auto source_of = [&](int tap) {
      return buffers + int64_t(load_constant(p.index + c.source + tap * c.positions + place)) * kSourceUnit;
    };
    const char *weights = weights_of(0), *source = source_of(0);
    Operands operands[2];
    operands[0].load(weights, source);
    DEFGAN_NO_UNROLL
    for (int tap = 0; tap < c.taps; ++tap) {
      // The last unit of a tap is followed by the first of the next one, the very last one by itself.
      const int next = tap + 1 < c.taps ? tap + 1 : tap;
      const char *const next_weights = weights_of(next), *const next_source = source_of(next);
      DEFGAN_NO_UNROLL
      for (int unit = 0; unit < units; unit += 2)
        static_for<2>([&](auto j) {
          const bool within = unit + j + 1 < units;
          weights = within ? weights + kWeightStep : next_weights;
          source = within ? source + kSourceStep : next_source;
          operands[1 - j].load(weights, source);
          static_for<kUnit>([&](auto k) { sums.add(operands[j].w[k], operands[j].x[k][0], operands[j].x[k][1]); });
        });
    }
  }
};

}  // namespace defgan::cuda
