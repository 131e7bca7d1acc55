// Threads share the candidates: each takes a range of groups past all images of a block and keeps every image's R best;
// then the threads share the images and join what they found. (score, index) orders candidates totally, so neither
// division can be seen in the result.
#include "nearest.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "instruction_sets.h"
#include "nearest_kernels.h"
#include "projection.h"
#include "team.h"

namespace defgan::cpu {

CandidateKernel active_candidate_kernel() {
#if defined(__x86_64__)
  const std::string name = active_instruction_set().name;
  if (name == "avx2") return candidate_products_avx2;
  if (name != "baseline") return candidate_products_avx512;
#endif
  return candidate_products_baseline;
}

namespace {

// Decoded float32 images at a time.
constexpr int64_t kPieceBytes = int64_t(16) << 20;
// Images that pass by a group of candidates together, and entries of their lists in all threads.
constexpr int64_t kBlockImages = 512, kBlockEntries = int64_t(1) << 20;

struct Found {
  int64_t score, index;
  bool operator<(const Found& o) const { return score != o.score ? score < o.score : index < o.index; }
};

void pack_candidate(Candidates& to, int64_t index, const float* image) {
  const int64_t group = index / kCandidateGroup, lane = index % kCandidateGroup;
  int16_t* levels = to.levels.data() + group * to.pairs() * kCandidateGroup * 2;
  const bool finite = std::all_of(image, image + to.pixels, nearest::is_finite);
  int64_t norm = 0;
  for (int64_t i = 0; i < to.pixels; ++i) {
    const int32_t level = finite ? nearest::candidate_level(to.scale, image[i]) : 0;
    levels[(i / 2 * kCandidateGroup + lane) * 2 + i % 2] = int16_t(level);
    norm += level * level;
  }
  to.squared_norms[size_t(index)] = finite ? norm : nearest::kNotFinite;
}

// The largest magnitude of a finite image's pixels, 0 for others.
float largest_of(const float* image, int64_t pixels) {
  float largest = 0;
  for (int64_t i = 0; i < pixels; ++i) {
    if (!nearest::is_finite(image[i])) return 0;
    largest = std::max(largest, std::abs(image[i]));
  }
  return largest;
}

// An image as levels, two a word; returns what its products are multiplied by in scores, 0 if it is not finite.
int64_t pack_image(const Candidates& candidates, const float* image, int32_t* words) {
  const nearest::Scale scale = candidates.scale;
  float largest = 0;
  for (int64_t i = 0; i < candidates.pixels; ++i) {
    const float scaled = (image[i] - scale.centre) * scale.levels_per_unit;
    largest = std::max(largest, nearest::is_finite(scaled) ? std::abs(scaled) : nearest::kBeyond);
  }
  const nearest::ImageScale own = nearest::image_scale(largest);
  if (own.exponent < 0) {
    std::fill(words, words + candidates.pairs(), 0);
    return 0;
  }
  for (int64_t pair = 0; pair < candidates.pairs(); ++pair) {
    int16_t both[2] = {};
    for (int64_t i = 2 * pair; i < std::min(2 * pair + 2, candidates.pixels); ++i)
      both[i % 2] = int16_t(nearest::image_level(scale, own, image[i]));
    std::memcpy(words + pair, both, 4);
  }
  return nearest::product_factor(own.exponent, candidates.pixels);
}

// The images of one block, packed, and the best candidates of each that every thread has seen.
class Search {
 public:
  Search(const Candidates& candidates, const NearestArgs& args, int64_t images, int threads)
      : candidates_(candidates),
        args_(args),
        threads_(threads),
        words_(size_t(images * candidates.pairs())),
        factors_(size_t(images)),
        best_(size_t(images * threads)) {}

  // Images [first, first + count) of the call.
  void run(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (std::vector<Found>& list : best_) list.clear();
    Barrier barrier(threads_);
    Interruption interruption;
    run_threads(threads_, interruption, [&](int thread) {
      const Member member{thread, threads_, &barrier};
      const Range mine = member.share(count_);
      for (int64_t i = mine.begin; i < mine.end; ++i)
        factors_[size_t(i)] = pack_image(candidates_, args_.images + (first_ + i) * candidates_.pixels,
                                         words_.data() + i * candidates_.pairs());
      member.meet();
      compare(member, interruption);
      member.meet();
      // Whoever cut its comparison short had heard it before they met, so all see it here.
      if (interruption.heard()) return;
      for (int64_t i = mine.begin; i < mine.end; ++i) join(i);
    });
  }

 private:
  std::vector<Found>& list(int64_t image, int thread) { return best_[size_t(image * threads_ + thread)]; }

  void compare(const Member& member, Interruption& interruption) {
    const int64_t groups = (candidates_.count + kCandidateGroup - 1) / kCandidateGroup;
    const CandidateKernel kernel = active_candidate_kernel();
    std::vector<int64_t> products(size_t(count_ * kCandidateGroup));
    const Range mine = member.share(groups);
    for (int64_t group = mine.begin; group < mine.end && !interruption.heard(); ++group) {
      if (member.id == 0) interruption.ask();
      kernel({words_.data(), count_, candidates_.levels.data() + group * candidates_.pairs() * kCandidateGroup * 2,
              candidates_.pairs(), products.data()});
      for (int64_t i = 0; i < count_; ++i)
        if (factors_[size_t(i)]) keep_best(list(i, member.id), i, group, products.data() + i * kCandidateGroup);
    }
  }

  // A heap whose first entry is the worst of the best.
  void keep_best(std::vector<Found>& best, int64_t image, int64_t group, const int64_t* products) const {
    const int64_t first = group * kCandidateGroup, last = std::min(first + kCandidateGroup, candidates_.count);
    static_assert(128 % kCandidateGroup == 0, "one word of drawn bits must serve a whole group");
    const uint64_t bits = args_.draws ? nearest::drawn_bits(args_.draws[first_ + image], first / 128) : 0;
    for (int64_t c = first; c < last; ++c) {
      Found found{candidates_.squared_norms[size_t(c)] - factors_[size_t(image)] * products[c - first], c};
      if (args_.draws && !nearest::takes_part(bits, c)) found.score += nearest::kNotDrawn;
      if (int64_t(best.size()) == args_.restarts) {
        if (!(found < best.front())) continue;
        std::pop_heap(best.begin(), best.end());
        best.back() = found;
      } else {
        best.push_back(found);
      }
      std::push_heap(best.begin(), best.end());
    }
  }

  void join(int64_t image) {
    int64_t* indices = args_.indices + (first_ + image) * args_.restarts;
    if (!factors_[size_t(image)]) {
      for (int64_t r = 0; r < args_.restarts; ++r) indices[r] = r;
      return;
    }
    std::vector<Found>& all = list(image, 0);
    for (int thread = 1; thread < threads_; ++thread) {
      const std::vector<Found>& other = list(image, thread);
      all.insert(all.end(), other.begin(), other.end());
    }
    std::sort(all.begin(), all.end());
    for (int64_t r = 0; r < args_.restarts; ++r) indices[r] = all[size_t(r)].index;
  }

  const Candidates& candidates_;
  const NearestArgs& args_;
  const int threads_;
  std::vector<int32_t> words_;
  std::vector<int64_t> factors_;
  std::vector<std::vector<Found>> best_;
  int64_t first_ = 0, count_ = 0;
};

}  // namespace

std::shared_ptr<const Candidates> decode_candidates(const Plan& plan, const PackedGenerator& generator,
                                                    const float* latents, int64_t count, int threads) {
  auto made = std::make_shared<Candidates>();
  made->count = count;
  made->pixels = plan.image.elements();
  const int64_t groups = (count + kCandidateGroup - 1) / kCandidateGroup, k = plan.latent_size();
  made->levels.assign(size_t(groups * kCandidateGroup * 2 * made->pairs()), 0);
  made->squared_norms.resize(size_t(count));

  const int64_t rows = std::min(count, std::max<int64_t>(1, kPieceBytes / (made->pixels * 4)));
  std::vector<float> images(size_t(rows * made->pixels));
  const auto for_images = [&](const auto& use) {
    for (int64_t first = 0; first < count; first += rows) {
      const int64_t piece = std::min(rows, count - first);
      decode(generator, latents + first * k, piece, threads, 0, images.data());
      const Lease lease(threads);
      run_threads(lease.threads(), [&](int thread) {
        const Range mine = Member{thread, lease.threads(), nullptr}.share(piece);
        for (int64_t i = mine.begin; i < mine.end; ++i) use(thread, first + i, images.data() + i * made->pixels);
      });
    }
  };
  float largest = 0;
  if (!nearest::bounded(plan)) {
    std::vector<float> by_thread(size_t(std::max(threads, 1)), 0.0f);
    for_images([&](int thread, int64_t, const float* image) {
      float& mine = by_thread[size_t(thread)];
      mine = std::max(mine, largest_of(image, made->pixels));
    });
    largest = *std::max_element(by_thread.begin(), by_thread.end());
  }
  made->scale = nearest::scale_of(nearest::bounded(plan), nearest::is_sigmoid(plan), largest);
  for_images([&](int, int64_t index, const float* image) { pack_candidate(*made, index, image); });
  return made;
}

void find_nearest(const Candidates& candidates, const NearestArgs& args) {
  if (args.images_count == 0) return;
  const Lease lease(args.threads);
  const int64_t entries = args.restarts * lease.threads();
  const int64_t images = std::min({args.images_count, kBlockImages, std::max<int64_t>(1, kBlockEntries / entries)});
  Search search(candidates, args, images, lease.threads());
  for (int64_t first = 0; first < args.images_count; first += images)
    search.run(first, std::min(images, args.images_count - first));
}

}  // namespace defgan::cpu
