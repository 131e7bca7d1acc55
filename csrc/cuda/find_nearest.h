// Kernels that find the nearest candidates of each image (../candidate_pixels.h has the arithmetic, which is exact: any order of
// sums gives the same bits, and the CPU's kernels give them too).
//
// Candidates stay decoded on the device between calls. Whether they are still those of the parameters is decided there,
// by comparing every word with a copy, so the host never waits: the kernels that decode, pack and copy anew are launched
// in every call and return at once where nothing has changed.
//
// Scores: a warp takes 32 candidates, a lane each, past 8 images that lie in shared memory; sums of products are in
// registers. Selection: a block takes an image and R times the least score beyond the last one.
#pragma once

#include "../candidate_pixels.h"
#include "device.h"
#include "nearest_params.h"

namespace defgan::cuda {

DEFGAN_DEVICE int nearest_lane() { return thread_index() % kLanes; }
DEFGAN_DEVICE int nearest_warp() { return thread_index() / kLanes; }

// ---- are the kept candidates those of these parameters?

// use(the tensor's word, where its copy is) for every word, shared by all threads of the grid.
template <class Use>
DEFGAN_DEVICE void for_content(const ContentParams& p, const Use& use) {
  const int threads = block_count() * block_threads(), first = block_index() * block_threads() + thread_index();
  uint32_t* copy = p.copy;
  for (int n = 0; n < p.count; ++n) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(p.data[n]);
    for (int i = first; i < p.words[n]; i += threads) use(load_global(words + i), copy + i);
    copy += p.words[n];
  }
}

DEFGAN_DEVICE void compare_content_kernel(const ContentParams& p) {
  // A copy that was never made is not read.
  uint32_t differs = load_global(p.valid) == 0;
  if (!differs) for_content(p, [&](uint32_t word, uint32_t* copy) { differs |= uint32_t(word != load_global(copy)); });
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  store_shared(shared + thread_index(), differs);
  sync_block();
  if (thread_index() != 0) return;
  for (int i = 1; i < block_threads(); ++i) differs |= load_shared(shared + i);
  store_global(p.differs + block_index(), differs);
}

DEFGAN_DEVICE void decide_stale_kernel(const ContentParams& p) {
  if (thread_index() != 0) return;
  uint32_t stale = 0;
  for (int i = 0; i < p.blocks; ++i) stale |= load_global(p.differs + i);
  store_global(p.stale, stale);
}

// After the candidates were packed: another stream that finds all words equal may read them.
DEFGAN_DEVICE void copy_content_kernel(const ContentParams& p) {
  if (load_global(p.stale) == 0) return;
  for_content(p, [](uint32_t word, uint32_t* copy) { store_global(copy, word); });
  if (block_index() == 0 && thread_index() == 0) store_global(p.valid, 1u);
}

// ---- candidates

DEFGAN_DEVICE float warp_max(float value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

DEFGAN_DEVICE float block_max(float value) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  value = warp_max(value);
  sync_block();  // the last use of it is over
  if (nearest_lane() == 0) store_shared(shared + nearest_warp(), value);
  sync_block();
  for (int warp = 0; warp < kNearestWarps; ++warp) {
    const float other = load_shared(shared + warp);
    value = other > value ? other : value;
  }
  return value;
}

DEFGAN_DEVICE float magnitude(float x) { return x < 0 ? -x : x; }

// The largest magnitude of a decoded image's pixels, the same in all lanes; beyond all numbers where one is not finite.
DEFGAN_DEVICE float largest_of(const NearestParams& p, int row) {
  float largest = 0;
  for (int i = nearest_lane(); i < p.pixels; i += kLanes) {
    const float value = load_global(p.decoded + int64_t(row) * p.pixels + i);
    const float own = nearest::is_finite(value) ? magnitude(value) : nearest::kBeyond;
    largest = own > largest ? own : largest;
  }
  return warp_max(largest);
}

DEFGAN_DEVICE void largest_pixel_kernel(const NearestParams& p) {
  if (load_global(p.stale) == 0) return;
  float largest = p.piece_first == 0 ? 0.0f : load_global(p.largest + block_index());
  for (int row = block_index() * kNearestWarps + nearest_warp(); row < p.piece_rows;
       row += block_count() * kNearestWarps) {
    const float own = largest_of(p, row);
    if (own < nearest::kBeyond && own > largest) largest = own;
  }
  largest = block_max(largest);
  if (thread_index() == 0) store_global(p.largest + block_index(), largest);
}

DEFGAN_DEVICE nearest::Scale scale_for(const NearestParams& p) {
  float largest = 0;
  for (int i = 0; !p.is_bounded && i < kLargestBlocks; ++i) {
    const float other = load_global(p.largest + i);
    largest = other > largest ? other : largest;
  }
  return nearest::scale_of(p.is_bounded, p.is_sigmoid, largest);
}

// A warp takes a candidate. Those beyond the last one, which fill its group of 32, are zeros.
DEFGAN_DEVICE void pack_candidates_kernel(const NearestParams& p) {
  if (load_global(p.stale) == 0) return;
  const nearest::Scale scale = scale_for(p);
  int64_t* norms = reinterpret_cast<int64_t*>(shared_memory()) + thread_index() / kLanes * kLanes;
  const int rows = (p.piece_rows + kLanes - 1) / kLanes * kLanes;
  for (int row = block_index() * kNearestWarps + nearest_warp(); row < rows; row += block_count() * kNearestWarps) {
    const bool exists = row < p.piece_rows;
    const bool finite = exists && largest_of(p, row) < nearest::kBeyond;
    const int candidate = p.piece_first + row;
    char* levels = p.levels + (int64_t(candidate / kLanes) * p.quads * kLanes + candidate % kLanes) * kQuadPixels * 2;
    int64_t norm = 0;
    for (int i = nearest_lane(); i < p.quads * kQuadPixels; i += kLanes) {
      int32_t level = 0;
      if (finite && i < p.pixels)
        level = nearest::candidate_level(scale, load_global(p.decoded + int64_t(row) * p.pixels + i));
      const int64_t offset = int64_t(i / kQuadPixels) * kLanes * kQuadPixels + i % kQuadPixels;
      store_global(reinterpret_cast<uint16_t*>(levels) + offset, uint16_t(level));
      norm += level * level;
    }
    store_shared(norms + nearest_lane(), norm);
    sync_warp();
    if (nearest_lane() == 0 && exists) {
      for (int i = 1; i < kLanes; ++i) norm += load_shared(norms + i);
      const int64_t last = nearest::kNotFinite;
      store_global(p.squared_norms + candidate, finite ? norm : last);
    }
    sync_warp();
  }
}

// ---- images

DEFGAN_DEVICE void pack_images_kernel(const NearestParams& p) {
  const nearest::Scale scale = scale_for(p);
  for (int image = block_index(); image < p.image_count; image += block_count()) {
    const float* pixels = p.images + int64_t(image) * p.pixels;
    float largest = 0;
    for (int i = thread_index(); i < p.pixels; i += block_threads()) {
      const float scaled = (load_global(pixels + i) - scale.centre) * scale.levels_per_unit;
      const float own = nearest::is_finite(scaled) ? magnitude(scaled) : nearest::kBeyond;
      largest = own > largest ? own : largest;
    }
    const nearest::ImageScale own = nearest::image_scale(block_max(largest));
    uint16_t* words = reinterpret_cast<uint16_t*>(p.words) + int64_t(image) * p.quads * kQuadPixels;
    for (int i = thread_index(); i < p.quads * kQuadPixels; i += block_threads()) {
      const bool used = own.exponent >= 0 && i < p.pixels;
      store_global(words + i, uint16_t(used ? nearest::image_level(scale, own, load_global(pixels + i)) : 0));
    }
    if (thread_index() == 0)
      store_global(p.factors + image, own.exponent < 0 ? 0 : nearest::product_factor(own.exponent, p.pixels));
  }
}

// ---- scores

DEFGAN_DEVICE int32_t product_of_words(uint32_t a, uint32_t b) {
  return int32_t(int16_t(a)) * int16_t(b) + int32_t(int16_t(a >> 16)) * int16_t(b >> 16);
}

DEFGAN_DEVICE int32_t product_of_quads(const Vec4& a, const Vec4& b) {
  return product_of_words(a.x, b.x) + product_of_words(a.y, b.y) + product_of_words(a.z, b.z) +
         product_of_words(a.w, b.w);
}

static_assert(kScoreSharedBytes == kScoreImages * kScoreQuads * int(sizeof(Vec4)));

DEFGAN_DEVICE void score_kernel(const NearestParams& p) {
  constexpr int kExactQuads = nearest::kExactPairs * 2 / kQuadPixels;
  static_assert(kScoreQuads % kExactQuads == 0, "32-bit sums end where a piece of the images does");
  const int groups = (p.count + kLanes - 1) / kLanes, group_blocks = (groups + kNearestWarps - 1) / kNearestWarps;
  const int group = block_index() % group_blocks * kNearestWarps + nearest_warp();
  const int first = block_index() / group_blocks * kScoreImages;
  const int images = p.image_count - first < kScoreImages ? p.image_count - first : kScoreImages;
  const Vec4* levels = reinterpret_cast<const Vec4*>(p.levels) + int64_t(group) * p.quads * kLanes + nearest_lane();
  const Vec4* words = reinterpret_cast<const Vec4*>(p.words) + int64_t(first) * p.quads;
  Vec4* shared = reinterpret_cast<Vec4*>(shared_memory());
  int64_t totals[kScoreImages] = {};
  for (int begin = 0; begin < p.quads; begin += kScoreQuads) {
    const int quads = p.quads - begin < kScoreQuads ? p.quads - begin : kScoreQuads;
    sync_block();
    for (int i = thread_index(); i < kScoreImages * kScoreQuads; i += block_threads()) {
      const int image = i / kScoreQuads, quad = i % kScoreQuads;
      if (quad >= quads) continue;
      store_shared(shared + i, image < images ? load_global(words + int64_t(image) * p.quads + begin + quad) : Vec4{});
    }
    sync_block();
    if (group >= groups) continue;
    for (int at = 0; at < quads; at += kExactQuads) {
      int32_t sums[kScoreImages] = {};
      const int end = at + kExactQuads < quads ? at + kExactQuads : quads;
      for (int quad = at; quad < end; ++quad) {
        const Vec4 candidate = load_constant(levels + int64_t(begin + quad) * kLanes);
        static_for<kScoreImages>(
            [&](auto i) { sums[i] += product_of_quads(candidate, load_shared(shared + i * kScoreQuads + quad)); });
      }
      static_for<kScoreImages>([&](auto i) { totals[i] += sums[i]; });
    }
  }
  const int candidate = group * kLanes + nearest_lane();
  if (candidate >= p.count) return;
  const int64_t norm = load_global(p.squared_norms + candidate);
  static_for<kScoreImages>([&](auto i) {
    if (i >= images) return;
    const int64_t factor = load_global(p.factors + first + i);
    int64_t score = 0;  // of an image that is not finite: its nearest candidates are the first ones
    if (factor != 0) {
      score = norm - factor * totals[i];
      if (p.draws != nullptr) {
        const uint64_t bits = nearest::drawn_bits(load_global(p.draws + first + i), candidate / 128);
        if (!nearest::takes_part(bits, candidate)) score += nearest::kNotDrawn;
      }
    }
    store_global(p.scores + int64_t(first + i) * p.count + candidate, score);
  });
}

// ---- selection

struct alignas(16) Scored {
  int64_t score, index;
};
DEFGAN_DEVICE bool before(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score < b.score : a.index < b.index;
}

static_assert(kSelectSharedBytes == kNearestThreads * int(sizeof(Scored)));

DEFGAN_DEVICE Scored block_first(const Scored& own) {
  Scored* shared = reinterpret_cast<Scored*>(shared_memory());
  sync_block();  // the last use of it is over
  store_shared(shared + thread_index(), own);
  sync_block();
  for (int half = kNearestThreads / 2; half > 0; half /= 2) {
    if (thread_index() < half) {
      const Scored other = load_shared(shared + thread_index() + half);
      if (before(other, load_shared(shared + thread_index()))) store_shared(shared + thread_index(), other);
    }
    sync_block();
  }
  return load_shared(shared);
}

DEFGAN_DEVICE void select_kernel(const NearestParams& p) {
  for (int image = block_index(); image < p.image_count; image += block_count()) {
    const int64_t* scores = p.scores + int64_t(image) * p.count;
    Scored last{INT64_MIN, -1};
    for (int r = 0; r < p.restarts; ++r) {
      Scored best{INT64_MAX, p.count};
      for (int c = thread_index(); c < p.count; c += block_threads()) {
        const Scored own{load_global(scores + c), c};
        if (before(last, own) && before(own, best)) best = own;
      }
      last = block_first(best);
      if (thread_index() == 0) store_global(p.indices + int64_t(image) * p.restarts + r, last.index);
    }
  }
}

}  // namespace defgan::cuda
