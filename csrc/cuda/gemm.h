// Matrix products of the layered and split mappings: one warp takes a tile of destination channels by some (position,
// group) columns of 8 rows through all taps, operands straight from L2 into registers.
//
//   sum[channel][position, row] = sum over taps of W[matrix of the tap][channel][:] * source[position of the tap][row][:]
//
// In 16 bits weights are A fragments and activations B fragments, both stored as lanes hold them (layout.h), so a load
// is 16 bytes a lane and 512 contiguous bytes a warp. A ring of kDepth steps (32 source channels each) is in flight.
// The order of summation is the tables': taps in order, channels ascending, one accumulator, or kChains of them taken in
// turn by 16 channels and added pairwise at the end.
#pragma once

#include "layout.h"

namespace defgan::cuda {

// A stage of products as one team sees it. Header and stage are in shared memory, where they cost no registers.
struct Product {
  const Header* header;
  const Stage* stage;
  const int32_t* index;
  const PositionClass* classes;  // the stage's
  const char* weights;           // the stage's
  const float* vectors;
  char* groups;         // buffers of the team's first group
  int32_t group_count;  // of the team
  float momentum, rate;
};

// Where tile `tile` of a class begins. Columns are numbered position by position, groups innermost; neighbouring tiles
// have the same weights, which L1 then serves to the warps of a block.
template <int kColumns>
struct Columns {
  int position[kColumns];  // within its class; the class's number of positions stands for "no column"
  int group[kColumns];

  DEFGAN_DEVICE Columns(const PositionClass& c, int group_count, int first) {
    static_for<kColumns>([&](auto i) {
      const int at = (first + i) / group_count;
      position[i] = at < c.positions ? at : c.positions;
      group[i] = (first + i) % group_count;
    });
  }
};

// Sums of rows 16 tile + lane / 4 (c[0], c[1]) and 8 more (c[2], c[3]) for rows 2 (lane % 4) and one more of a group.
template <class S>
DEFGAN_DEVICE void finish_fragment(const Product& p, int tile, int position, int group, int lane, float c0, float c1,
                                   float c2, float c3) {
  const Stage& s = *p.stage;
  char* const buffers = p.groups + int64_t(group) * p.header->group_bytes;
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
      if (k < p.header->latent_size) {
        const int64_t at = int64_t(k) * (kGroupRows / 2) + pair;
        Float2* const latents = reinterpret_cast<Float2*>(buffers + p.header->latent) + at;
        Float2* const velocities = reinterpret_cast<Float2*>(buffers + p.header->velocity) + at;
        Float2 z = load_global(latents), velocity = load_global(velocities);
        momentum_step(z.x, velocity.x, v[2 * half], p.header->gradient_scale, p.momentum, p.rate);
        momentum_step(z.y, velocity.y, v[2 * half + 1], p.header->gradient_scale, p.momentum, p.rate);
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

// A tile of kTiles x 16 channels by kColumns columns.
template <class S, int kTiles, int kColumns, int kDepth, int kChainCount>
struct TensorTile {
  static_assert(kChainCount == 1 || (kChainCount == 4 && kDepth % 2 == 0), "a step holds two of four chains");
  static constexpr int kChannels = kTiles * 16;
  static constexpr int kWidth = kColumns;

  DEFGAN_DEVICE_NOINLINE static void run(const Product& p, int number, int block, int first, int lane) {
    const PositionClass c = load_table<PositionClass>(reinterpret_cast<const char*>(p.classes + number));
    float sum[kColumns][kTiles][kChainCount][4] = {};
    accumulate(p, c, block * kTiles, first, lane, sum);
    const Columns<kColumns> columns(c, p.group_count, first);
    static_for<kColumns>([&](auto i) {
      if (columns.position[i] >= c.positions) return;
      const int position = load_constant(p.index + c.position + columns.position[i]);
      static_for<kTiles>([&](auto m) {
        float total[4];
        static_for<4>([&](auto j) {
          if constexpr (kChainCount == 1)
            total[j] = sum[i][m][0][j];
          else
            total[j] = (sum[i][m][0][j] + sum[i][m][1][j]) + (sum[i][m][2][j] + sum[i][m][3][j]);
        });
        finish_fragment<S>(p, block * kTiles + m, position, columns.group[i], lane, total[0], total[1], total[2],
                           total[3]);
      });
    });
  }

  DEFGAN_DEVICE static void accumulate(const Product& p, const PositionClass& c, int first_tile, int first, int lane,
                                       float (&sum)[kColumns][kTiles][kChainCount][4]) {
    constexpr uint32_t kBlockWords = Storage<S>::kBlockBytes / 16;
    const int chunks = p.stage->source_chunks, row_tiles = p.stage->destination_chunks * 2;
    const int steps = c.taps * chunks;
    if (steps == 0) return;  // positions that nothing reaches
    const Vec4* const sources = reinterpret_cast<const Vec4*>(p.groups + p.stage->source) + lane;
    const Vec4* const weights = reinterpret_cast<const Vec4*>(p.weights) + first_tile * chunks * 2 * kLanes + lane;
    const int matrix_words = row_tiles * chunks * 2 * kLanes;
    // Of each column its place in a line of the source table, and its group's buffers in words of 16 bytes (int32 holds
    // those of all groups in flight).
    int place[kColumns];
    uint32_t buffers[kColumns];
    uint32_t real = 0;  // a bit for each column that exists
    {
      const Columns<kColumns> columns(c, p.group_count, first);
      static_for<kColumns>([&](auto i) {
        real |= uint32_t(columns.position[i] < c.positions) << i;
        place[i] = columns.position[i] < c.positions ? columns.position[i] : 0;
        buffers[i] = uint32_t(columns.group[i]) * uint32_t(p.header->group_bytes / 16);
      });
    }

    Vec4 a[kDepth][kTiles][2], b[kDepth][kColumns];
    uint32_t valid[kDepth];
    // The next step to load. Past the last one it is loaded again: cheaper than asking.
    int tap = -1, chunk = chunks - 1;
    const Vec4* matrix = weights;
    uint32_t source[kColumns] = {};  // words
    uint32_t sourced = 0;            // a bit for each column whose source exists; the others load something and drop it
    const auto load = [&](auto slot) {
      if (chunk + 1 < chunks) {
        ++chunk;
      } else if (tap + 1 < c.taps) {
        ++tap;
        chunk = 0;
        matrix = weights + int64_t(load_constant(p.index + c.matrix + tap)) * matrix_words;
        const int32_t* const line = p.index + c.source + tap * c.positions;
        sourced = real;
        static_for<kColumns>([&](auto i) {
          const int position = load_constant(line + place[i]);
          if (position == kNone) sourced &= ~(1u << i);
          source[i] = buffers[i] + uint32_t(position == kNone ? 0 : position) * uint32_t(chunks) * kBlockWords;
        });
      }
      const Vec4* const fragments = matrix + chunk * 2 * kLanes;
      static_for<kTiles>([&](auto m) {
        a[slot][m][0] = load_constant(fragments + m * chunks * 2 * kLanes);
        a[slot][m][1] = load_constant(fragments + m * chunks * 2 * kLanes + kLanes);
      });
      static_for<kColumns>(
          [&](auto i) { b[slot][i] = load_global(sources + (source[i] + uint32_t(chunk) * kBlockWords)); });
      valid[slot] = sourced;
    };

    static_for<kDepth>([&](auto slot) { load(slot); });
    DEFGAN_NO_UNROLL
    for (int step = 0; step < steps; step += kDepth)
      static_for<kDepth>([&](auto slot) {
        if (step + slot >= steps) return;
        constexpr int kFirst = kChainCount == 1 ? 0 : slot % 2 * 2, kSecond = kChainCount == 1 ? 0 : kFirst + 1;
        static_for<kColumns>([&](auto i) {
          if (!(valid[slot] >> i & 1)) return;
          static_for<kTiles>(
              [&](auto m) { multiply_accumulate<S>(sum[i][m][kFirst], a[slot][m][0], b[slot][i].x, b[slot][i].y); });
          static_for<kTiles>(
              [&](auto m) { multiply_accumulate<S>(sum[i][m][kSecond], a[slot][m][1], b[slot][i].z, b[slot][i].w); });
        });
        load(slot);
      });
  }
};

// Float32 on the ordinary units: a lane has one channel of every column. A weight is loaded once a lane, a source's 8
// rows once a warp. One chain, fused multiply-adds.
template <int kColumns>
struct ScalarTile {
  static constexpr int kChannels = kChunk;
  static constexpr int kWidth = kColumns;

  DEFGAN_DEVICE_NOINLINE static void run(const Product& p, int number, int block, int first, int lane) {
    const Stage& s = *p.stage;
    const PositionClass c = load_table<PositionClass>(reinterpret_cast<const char*>(p.classes + number));
    const Columns<kColumns> columns(c, p.group_count, first);
    float sum[kColumns][kGroupRows] = {};
    for (int tap = 0; tap < c.taps; ++tap) {
      const int64_t m = load_constant(p.index + c.matrix + tap);
      const float* matrix = reinterpret_cast<const float*>(p.weights) +
                            (m * s.destination_chunks + block) * s.source_chunks * kChunk * kChunk + lane;
      const Float4* source[kColumns];
      static_for<kColumns>([&](auto i) {
        source[i] = nullptr;
        if (columns.position[i] >= c.positions) return;
        const int position = load_constant(p.index + c.source + tap * c.positions + columns.position[i]);
        if (position == kNone) return;
        source[i] =
            reinterpret_cast<const Float4*>(p.groups + int64_t(columns.group[i]) * p.header->group_bytes + s.source +
                                            int64_t(position) * s.source_chunks * Storage<float>::kBlockBytes);
      });
      for (int k = 0; k < s.source_channels; ++k) {
        const float w = load_constant(matrix + k * kChunk);
        static_for<kColumns>([&](auto i) {
          if (source[i] == nullptr) return;
          const Float4 low = load_global(source[i] + k * 2), high = load_global(source[i] + k * 2 + 1);
          const float x[kGroupRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          static_for<kGroupRows>([&](auto j) { sum[i][j] = fused_multiply_add(w, x[j], sum[i][j]); });
        });
      }
    }
    static_for<kColumns>([&](auto i) {
      if (columns.position[i] >= c.positions) return;
      const int position = load_constant(p.index + c.position + columns.position[i]);
      finish(p, block, position, columns.group[i], lane, sum[i]);
    });
  }

  DEFGAN_DEVICE static void finish(const Product& p, int block, int position, int group, int lane,
                                   const float (&sum)[kGroupRows]) {
    const Stage& s = *p.stage;
    char* const buffers = p.groups + int64_t(group) * p.header->group_bytes;
    char* const at =
        buffers + s.destination + (int64_t(position) * s.destination_chunks + block) * Storage<float>::kBlockBytes;
    const int channel = block * kChunk + lane;
    float v[kGroupRows];
    static_for<kGroupRows>([&](auto j) { v[j] = sum[j]; });
    if (s.epilogue == Epilogue::kActivate) {
      const float bias = load_constant(p.vectors + s.bias + int64_t(position) * s.bias_stride + channel);
      static_for<kGroupRows>([&](auto j) { v[j] = activate(s.activation, s.slope, v[j] + bias); });
    } else if (s.epilogue == Epilogue::kGradient) {
      float y[kGroupRows];
      Storage<float>::load(at, lane, y);
      static_for<kGroupRows>([&](auto j) { v[j] = differentiate(s.activation, s.slope, y[j], v[j]); });
    } else if (s.epilogue == Epilogue::kUpdate) {
      update_line(p, buffers, channel, v);
    }
    Storage<float>::store(at, lane, v);
  }

  // v: the gradient of one channel of the latent in, the new latent out.
  DEFGAN_DEVICE static void update_line(const Product& p, char* buffers, int channel, float (&v)[kGroupRows]) {
    if (channel >= p.header->latent_size) {
      static_for<kGroupRows>([&](auto j) { v[j] = 0.0f; });
      return;
    }
    char* const latents = buffers + p.header->latent;
    char* const velocities = buffers + p.header->velocity;
    float z[kGroupRows], velocity[kGroupRows];
    Storage<float>::load(latents, channel, z);
    Storage<float>::load(velocities, channel, velocity);
    static_for<kGroupRows>([&](auto j) {
      momentum_step(z[j], velocity[j], v[j], p.header->gradient_scale, p.momentum, p.rate);
      v[j] = z[j];
    });
    Storage<float>::store(latents, channel, z);
    Storage<float>::store(velocities, channel, velocity);
  }
};

}  // namespace defgan::cuda
