// The layered and the split mapping: a team of blocks takes its groups of rows through all steps, stage by stage, with
// a barrier of the team after each. One team of the whole grid shares every layer of all rows (layered), or many teams
// have a few groups each (split), which was meant for few rows: but a barrier of 6 blocks costs what one of 132 does.
// Within a stage warps take tiles of matrix products, threads take pieces of everything else. Activations live in
// global memory, small enough for L2.
//
// Also the forward pass alone, in float32: the final error of each row, and decoding.
#pragma once

#include "gemm.h"
#include "sphere.h"

namespace defgan::cuda {

// Stages other than products are functions of their own: inlined into the loop over steps, what each of them can compute
// beforehand would be computed there, and occupy registers that the tiles of products need. Products are not: in a
// function every access of global memory costs two instructions more.
template <class S>
struct Team {
  // Tiles, from many products to few. Bits do not depend on the choice.
  static constexpr bool kTensor = !std::is_same_v<S, float>;
  using Wide = std::conditional_t<kTensor, TensorTile<S, 2, 4, 4, 1>, ScalarTile<8>>;
  using Narrow = std::conditional_t<kTensor, TensorTile<S, 2, 2, 6, 1>, ScalarTile<1>>;
  using Single = std::conditional_t<kTensor, TensorTile<S, 1, 1, 12, 1>, ScalarTile<1>>;
  using Long = std::conditional_t<kTensor, TensorTile<S, 1, 1, 12, kChains>, ScalarTile<1>>;
  enum : int { kWide, kNarrow, kSingle, kLong };

  const TeamParams& p;
  const int32_t* index;
  int first_group, groups;  // of this team
  int thread, threads;      // of the team
  TeamBarrier* barrier;

  DEFGAN_DEVICE explicit Team(const TeamParams& params) : p(params) {
    bring(&team_tables()->header, p.tables);
    sync_block();
    index = reinterpret_cast<const int32_t*>(p.tables + header().index);
    const int team = block_index() / p.blocks_per_team;
    first_group = int(int64_t(p.group_count) * team / p.teams);
    groups = int(int64_t(p.group_count) * (team + 1) / p.teams) - first_group;
    threads = p.blocks_per_team * block_threads();
    thread = block_index() % p.blocks_per_team * block_threads() + thread_index();
    barrier = p.barriers + team;
  }

  DEFGAN_DEVICE void meet() const { sync_team(barrier, p.blocks_per_team); }
  DEFGAN_DEVICE char* buffers(int group) const {
    return p.groups + int64_t(first_group + group) * header().group_bytes;
  }
  DEFGAN_DEVICE int row_of(int group, int row) const {
    return p.call.first_row + (first_group + group) * kGroupRows + row;
  }

  template <class T>
  DEFGAN_DEVICE static void bring(T* to, const char* from) {
    const int i = thread_index();
    if (i < int(sizeof(T) / 16))
      store_shared(reinterpret_cast<Vec4*>(to) + i, load_constant(reinterpret_cast<const Vec4*>(from) + i));
  }
  // The slot of a stage is free since the last barrier.
  DEFGAN_DEVICE void bring_stage(int n, int slot) const {
    static_assert(sizeof(StageRecord) / 16 <= kTeamThreads, "a thread brings one word");
    bring(&team_tables()->stages[slot], p.tables + header().stages + n * int64_t(sizeof(StageRecord)));
  }

  // --- the latent ---------------------------------------------------------------------------------------

  DEFGAN_DEVICE_NOINLINE void start() const {
    const Header& h = header();
    const int64_t input = stage_in(0).source;
    const int zeros = h.zero_bytes / 16;
    for (int i = thread; i < groups * zeros; i += threads)
      store_global(reinterpret_cast<Vec4*>(buffers(i / zeros) + h.zero) + i % zeros, Vec4{0, 0, 0, 0});
    for (int i = thread; i < groups * h.latent_chunks * kLanes; i += threads) {
      const int lane = i % kLanes, chunk = i / kLanes % h.latent_chunks, group = i / kLanes / h.latent_chunks;
      float* const latent = reinterpret_cast<float*>(buffers(group) + h.latent);
      float* const velocity = reinterpret_cast<float*>(buffers(group) + h.velocity);
      float v[kPiece];
      static_for<kPiece>([&](auto j) {
        const int channel = chunk * kChunk + Storage<S>::channel(lane, j), row = Storage<S>::row(lane, j);
        v[j] = starting_latent(p.call, row_of(group, row), channel, h.latent_size);
        if (channel < h.latent_size) {
          store_global(latent + channel * kGroupRows + row, v[j]);
          store_global(velocity + channel * kGroupRows + row,
                       starting_velocity(p.call, row_of(group, row), channel, h.latent_size));
        }
      });
      Storage<S>::store(buffers(group) + input + chunk * Storage<S>::kBlockBytes, lane, v);
    }
  }

  DEFGAN_DEVICE_NOINLINE void write_latents() const {
    const Header& h = header();
    for (int i = thread; i < groups * kGroupRows * h.latent_size; i += threads) {
      const int channel = i % h.latent_size, row = i / h.latent_size % kGroupRows,
                group = i / h.latent_size / kGroupRows;
      const int r = row_of(group, row);
      if (r >= p.call.rows) continue;
      const float* latent = reinterpret_cast<const float*>(buffers(group) + h.latent);
      const int64_t to = int64_t(r) * h.latent_size + channel;
      store_global(p.call.latents + to, load_global(latent + channel * kGroupRows + row));
      if (p.call.velocities_out == nullptr) continue;
      const float* velocity = reinterpret_cast<const float*>(buffers(group) + h.velocity);
      store_global(p.call.velocities_out + to, load_global(velocity + channel * kGroupRows + row));
    }
  }

  // Scales every row's latent to the norm of the sphere, a warp each group, tile by tile of 16 channels; slot: stage 0's.
  DEFGAN_DEVICE_NOINLINE void scale_latents(int slot) const {
    const Header& h = header();
    const int64_t input = stage_in(slot).source;
    const int lane = thread % kLanes, pair = lane % 4, tiles = (h.latent_size + 15) / 16;
    for (int group = thread / kLanes; group < groups; group += threads / kLanes) {
      Float2* const latents = reinterpret_cast<Float2*>(buffers(group) + h.latent) + pair;
      const auto at = [&](int tile, int half) { return tile * 16 + lane / 4 + half * 8; };  // a channel
      const auto load = [&](int tile, float (&z)[4]) {
        static_for<2>([&](auto half) {
          const int channel = at(tile, half);
          const Float2 two = channel < h.latent_size ? load_global(latents + channel * (kGroupRows / 2)) : Float2{0, 0};
          z[2 * half] = two.x, z[2 * half + 1] = two.y;
        });
      };
      float z[4];
      Double2 sum{0, 0};
      for (int tile = 0; tile < tiles; ++tile) {
        load(tile, z);
        const Double2 part = squares_of_tile(z);
        sum.x += part.x;
        sum.y += part.y;
      }
      const double low = scale_to(p.call.descent.radius, sum.x), high = scale_to(p.call.descent.radius, sum.y);
      for (int tile = 0; tile < tiles; ++tile) {
        load(tile, z);
        static_for<2>([&](auto half) {
          z[2 * half] = scaled(z[2 * half], low), z[2 * half + 1] = scaled(z[2 * half + 1], high);
          if (at(tile, half) < h.latent_size)
            store_global(latents + at(tile, half) * (kGroupRows / 2), Float2{z[2 * half], z[2 * half + 1]});
        });
        sync_warp();  // the lanes' paths differed, and the transposition wants them together
        store_input(buffers(group) + input + tile / 2 * Storage<S>::kBlockBytes, tile % 2, lane, z);
      }
    }
  }

  // A tile's half of a block of the first layer's input.
  DEFGAN_DEVICE static void store_input(char* block, int half, int lane, const float (&z)[4]) {
    if constexpr (kTensor) {
      const uint32_t low = transpose_8x8(pack2<S>(z[0], z[1])), high = transpose_8x8(pack2<S>(z[2], z[3]));
      store_global(reinterpret_cast<Vec2*>(block + lane * 16 + half * 8), Vec2{low, high});
    } else {
      Float2* const to = reinterpret_cast<Float2*>(block) + (half * 16 + lane / 4) * (kGroupRows / 2) + lane % 4;
      store_global(to, Float2{z[0], z[1]});
      store_global(to + 8 * (kGroupRows / 2), Float2{z[2], z[3]});
    }
  }

  // --- stages -------------------------------------------------------------------------------------------

  template <class Tile>
  DEFGAN_DEVICE int tiles_across(int positions) const {
    return (positions * groups + Tile::kWidth - 1) / Tile::kWidth;
  }
  template <class Tile>
  DEFGAN_DEVICE static int blocks_of(const Stage& s) {
    return s.destination_chunks * kChunk / Tile::kChannels;
  }

  template <class Tile>
  DEFGAN_DEVICE int tile_count(const Stage& s) const {
    int count = 0;
    for (int n = 0; n < s.class_count; ++n)
      count += tiles_across<Tile>(load_constant(&classes_of(s)[n].positions)) * blocks_of<Tile>(s);
    return count;
  }
  DEFGAN_DEVICE const PositionClass* classes_of(const Stage& s) const {
    return reinterpret_cast<const PositionClass*>(p.tables + header().classes) + s.classes;
  }

  // What a step of all of a stage's tiles costs about, in clocks of a Hopper: the multiprocessor's operands at the rate
  // of L2 (48 bytes a clock), or its warps' rounds.
  template <class Tile>
  DEFGAN_DEVICE int cost(const Stage& s) const {
    const int tiles = tile_count<Tile>(s), warps = threads / kLanes;
    const int moved = (tiles + p.blocks_per_team - 1) / p.blocks_per_team * (Tile::kStepBytes / 48);
    const int computed = (tiles + warps - 1) / warps * Tile::kStepClocks;
    return moved > computed ? moved : computed;
  }
  DEFGAN_DEVICE int choose(const Stage& s) const {
    if (kTensor && s.chains > 1) return kLong;
    const int wide = cost<Wide>(s), narrow = cost<Narrow>(s), single = cost<Single>(s);
    return wide <= narrow && wide <= single ? kWide : narrow <= single ? kNarrow : kSingle;
  }
  DEFGAN_DEVICE void choose_all(int stages) const {
    for (int n = thread_index(); n < stages && n < kMaxChoices; n += block_threads()) {
      const Stage s = load_table<Stage>(p.tables + header().stages + n * int64_t(sizeof(StageRecord)));
      store_shared(&team_tables()->choice[n], s.kind == StageKind::kGemm ? choose(s) : 0);
    }
  }

  template <class Tile>
  DEFGAN_DEVICE void multiply_tiles(const Stage& s, const Product& product) const {
    const int warps = threads / kLanes, block = block_index() % p.blocks_per_team;
    const int tiles_of_a_block = blocks_of<Tile>(s);
    int count = 0;
    for (int n = 0; n < s.class_count; ++n)
      count += tiles_across<Tile>(class_of(product, n).positions) * tiles_of_a_block;
    // Few tiles are spread over the multiprocessors; many go to neighbouring warps, which share operands in L1.
    int task = count < warps ? thread_index() / kLanes * p.blocks_per_team + block : thread / kLanes;
    for (int n = 0; n < s.class_count; ++n) {  // tasks are counted through all classes
      const int across = tiles_across<Tile>(class_of(product, n).positions);
      const int tiles = across * tiles_of_a_block;
      for (; task < tiles; task += warps)
        Tile::run(product, n, task / across, task % across * Tile::kWidth, thread % kLanes);
      task -= tiles;
    }
  }

  DEFGAN_DEVICE void multiply(int n, int slot, float rate) const {
    const Stage& s = stage_in(slot);
    const Product product{slot,      index,      classes_of(s), p.weights + s.weights,
                          p.vectors, buffers(0), groups,        p.call.descent.momentum,
                          rate};
    switch (n < kMaxChoices ? load_shared(&team_tables()->choice[n]) : choose(s)) {
      case kWide: return multiply_tiles<Wide>(s, product);
      case kNarrow: return multiply_tiles<Narrow>(s, product);
      case kSingle: return multiply_tiles<Single>(s, product);
      default: return multiply_tiles<Long>(s, product);
    }
  }

  // Calls visit(group, position, chunk, lane) for every piece of the stage's destination.
  template <class Visit>
  DEFGAN_DEVICE void each_piece(const Stage& s, const Visit& visit) const {
    const int pieces = s.destination_positions * s.destination_chunks * kLanes;
    for (int i = thread; i < pieces * groups; i += threads) {
      const int block = i % pieces / kLanes;
      visit(i / pieces, block / s.destination_chunks, block % s.destination_chunks, i % kLanes);
    }
  }

  // A piece of a map or a reorder: into the sums, into an activation, or over one as its gradient.
  DEFGAN_DEVICE void finish_piece(const Stage& s, float rate, int group, int position, int chunk, int lane,
                                  float (&v)[kPiece]) const {
    const Header& h = header();
    if (s.epilogue == Epilogue::kSums) {
      float* const sums = reinterpret_cast<float*>(buffers(group) + s.destination);
      static_for<kPiece>([&](auto j) {
        const int channel = chunk * kChunk + Storage<S>::channel(lane, j);
        store_global(sums + (int64_t(position) * s.destination_chunks * kChunk + channel) * kGroupRows +
                         Storage<S>::row(lane, j),
                     v[j]);
      });
      return;
    }
    char* const block =
        buffers(group) + s.destination + (int64_t(position) * s.destination_chunks + chunk) * Storage<S>::kBlockBytes;
    if (s.epilogue == Epilogue::kActivate) {
      static_for<kPiece>([&](auto j) { v[j] = activate(s.activation, s.slope, v[j]); });
    } else if (s.epilogue == Epilogue::kGradient) {
      float y[kPiece];
      Storage<S>::load(block, lane, y);
      static_for<kPiece>([&](auto j) { v[j] = differentiate(s.activation, s.slope, y[j], v[j]); });
    } else {
      static_for<kPiece>([&](auto j) {
        const int channel = chunk * kChunk + Storage<S>::channel(lane, j);
        if (channel < h.latent_size) {
          const int at = channel * kGroupRows + Storage<S>::row(lane, j);
          float* const latent = reinterpret_cast<float*>(buffers(group) + h.latent) + at;
          float* const velocity = reinterpret_cast<float*>(buffers(group) + h.velocity) + at;
          float z = load_global(latent), speed = load_global(velocity);
          momentum_step(z, speed, v[j], h.gradient_scale, p.call.descent.momentum, rate);
          store_global(latent, z);
          store_global(velocity, speed);
          v[j] = z;
        } else {
          v[j] = 0.0f;
        }
      });
    }
    Storage<S>::store(block, lane, v);
  }

  DEFGAN_DEVICE_NOINLINE void map(const Stage& s, float rate) const {
    each_piece(s, [&](int group, int position, int chunk, int lane) {
      const auto scaled = [&](int from, int scale_position, float (&v)[kPiece]) {
        Storage<S>::load(
            buffers(group) + s.source + (int64_t(from) * s.source_chunks + chunk) * Storage<S>::kBlockBytes, lane, v);
        if (s.scale == kNone) return;
        const float* scale = p.vectors + s.scale + int64_t(scale_position) * s.scale_stride + chunk * kChunk;
        static_for<kPiece>([&](auto j) { v[j] = v[j] * load_constant(scale + Storage<S>::channel(lane, j)); });
      };
      float v[kPiece] = {};
      if (!s.backward) {
        scaled(load_constant(index + s.index + position), position, v);
        if (s.shift != kNone) {
          const float* shift = p.vectors + s.shift + int64_t(position) * s.scale_stride + chunk * kChunk;
          static_for<kPiece>([&](auto j) { v[j] = v[j] + load_constant(shift + Storage<S>::channel(lane, j)); });
        }
      } else {
        const int end = load_constant(index + s.index_begin + position + 1);
        for (int t = load_constant(index + s.index_begin + position); t < end; ++t) {
          const int reader = load_constant(index + s.index + t);
          float part[kPiece];
          scaled(reader, reader, part);
          static_for<kPiece>([&](auto j) { v[j] = v[j] + part[j]; });
        }
      }
      finish_piece(s, rate, group, position, chunk, lane, v);
    });
  }

  // Each number of a piece from where the index says: of an activation (reorder) or of the image (spread).
  template <class Read>
  DEFGAN_DEVICE void gather(const Stage& s, int position, int chunk, int lane, float (&v)[kPiece],
                            const Read& read) const {
    static_for<kPiece>([&](auto j) {
      const int channel = chunk * kChunk + Storage<S>::channel(lane, j);
      const int from = load_constant(index + s.index + int64_t(position) * s.destination_chunks * kChunk + channel);
      v[j] = from == kNone ? 0.0f : read(from, Storage<S>::row(lane, j));
    });
  }

  DEFGAN_DEVICE_NOINLINE void reorder(const Stage& s, float rate) const {
    each_piece(s, [&](int group, int position, int chunk, int lane) {
      const int width = s.source_chunks * kChunk;
      float v[kPiece];
      gather(s, position, chunk, lane, v, [&](int from, int row) {
        const int64_t block = from / width * s.source_chunks + from % width / kChunk;
        return Storage<S>::load_one(buffers(group) + s.source + block * Storage<S>::kBlockBytes +
                                    Storage<S>::offset(from % kChunk, row));
      });
      finish_piece(s, rate, group, position, chunk, lane, v);
    });
  }

  DEFGAN_DEVICE_NOINLINE void spread(const Stage& s) const {
    each_piece(s, [&](int group, int position, int chunk, int lane) {
      float v[kPiece];
      gather(s, position, chunk, lane, v, [&](int pixel, int row) {
        return Storage<S>::load_one(buffers(group) + s.source + (pixel * kGroupRows + row) * int64_t(kElementBytes<S>));
      });
      Storage<S>::store(
          buffers(group) + s.destination + (int64_t(position) * s.destination_chunks + chunk) * Storage<S>::kBlockBytes,
          lane, v);
    });
  }

  // A thread makes two rows of one pixel from their sums, and the gradient of the error of it, or the pixel itself.
  DEFGAN_DEVICE_NOINLINE void image(const Stage& s) const {
    constexpr int kPairs = kGroupRows / 2;
    for (int i = thread; i < groups * s.pixels * kPairs; i += threads) {
      const int pair = i % kPairs, pixel = i / kPairs % s.pixels, group = i / kPairs / s.pixels;
      const float* sums = reinterpret_cast<const float*>(buffers(group) + s.source);
      const float bias = s.bias == kNone ? 0.0f : load_constant(p.vectors + s.bias + pixel);
      Float2 sum{bias, bias};
      const int end = load_constant(index + s.index_begin + pixel + 1);
      for (int e = load_constant(index + s.index_begin + pixel); e < end; ++e) {
        const Float2 part =
            load_global(reinterpret_cast<const Float2*>(sums + load_constant(index + s.index + e)) + pair);
        sum.x = sum.x + part.x;
        sum.y = sum.y + part.y;
      }
      const int row = row_of(group, pair * 2);
      char* const destination = buffers(group) + s.destination + int64_t(pixel) * kGroupRows * kElementBytes<S>;
      if (p.purpose == Purpose::kDescend) {
        Storage<S>::store_pair(
            destination, pair, image_gradient(s.activation, s.slope, sum.x, target_pixel(p.call, row, pixel, s.pixels)),
            image_gradient(s.activation, s.slope, sum.y, target_pixel(p.call, row + 1, pixel, s.pixels)));
        continue;
      }
      const float low = activate(s.activation, s.slope, sum.x), high = activate(s.activation, s.slope, sum.y);
      if (p.purpose == Purpose::kErrors) {
        Storage<S>::store_pair(destination, pair, low, high);
      } else {
        if (row < p.call.rows) store_global(p.decoded + int64_t(row) * s.pixels + pixel, low);
        if (row + 1 < p.call.rows) store_global(p.decoded + int64_t(row + 1) * s.pixels + pixel, high);
      }
    }
  }

  // A warp sums the squares of one row, each lane its pixels, then the lanes pairwise: one order, whatever the team.
  DEFGAN_DEVICE_NOINLINE void errors() const {
    const Header& h = header();
    const int lane = thread % kLanes;
    for (int i = thread / kLanes; i < groups * kGroupRows; i += threads / kLanes) {
      const int row = i % kGroupRows, group = i / kGroupRows;
      const float* image = reinterpret_cast<const float*>(buffers(group) + h.image);
      float sum = 0;
      for (int pixel = lane; pixel < h.pixels; pixel += kLanes) {
        const float difference =
            load_global(image + pixel * kGroupRows + row) - target_pixel(p.call, row_of(group, row), pixel, h.pixels);
        sum = fused_multiply_add(difference, difference, sum);
      }
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane == 0 && row_of(group, row) < p.call.rows)
        store_global(p.errors + row_of(group, row), sum / float(h.pixels));
    }
  }

  DEFGAN_DEVICE void run_stage(int n, int slot, float rate) const {
    const Stage& s = stage_in(slot);
    switch (s.kind) {
      case StageKind::kGemm: multiply(n, slot, rate); break;
      case StageKind::kMap: map(s, rate); break;
      case StageKind::kReorder: reorder(s, rate); break;
      case StageKind::kImage: image(s); break;
      case StageKind::kSpread: spread(s); break;
    }
  }

  DEFGAN_DEVICE void run() const {
    const bool descend = p.purpose == Purpose::kDescend;
    const bool scales = descend && p.call.descent.radius > 0;
    const int stages = descend ? header().all_stages : header().forward_stages;
    bring_stage(0, 0);
    choose_all(stages);
    sync_block();
    start();
    meet();
    int slot = 0;
    if (scales && p.call.velocities == nullptr) {
      scale_latents(slot);
      meet();
    }
    for (int step = 0; step < (descend ? p.call.descent.steps : 1); ++step) {
      const float rate = descend ? load_constant(p.call.descent.rates + step) : 0.0f;
      for (int n = 0; n < stages; ++n) {
        bring_stage(n + 1 < stages ? n + 1 : 0, 1 - slot);
        run_stage(n, slot, rate);
        meet();
        slot = 1 - slot;
      }
      if (scales) {
        scale_latents(slot);
        meet();
      }
    }
    if (descend) write_latents();
    if (p.purpose == Purpose::kErrors) errors();
  }
};

template <class S>
DEFGAN_DEVICE void team_kernel(const TeamParams& p) {
  if (p.wanted != nullptr && load_constant(p.wanted) == 0) return;
  Team<S>(p).run();
}

}  // namespace defgan::cuda
