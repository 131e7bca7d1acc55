// The nearest candidates for every instruction set of the machine against loops over all of them: ties, draws, images that
// are not finite, any number of threads. Made to run under the address, undefined-behaviour and thread sanitizers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../cpu/instruction_sets.h"
#include "../cpu/nearest.h"
#include "check.h"

using namespace defgan;
using namespace defgan::cpu;

namespace {

std::mt19937 rng(11);
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

// Candidate i is the i-th column of one matrix, so the decoded images are known exactly.
struct Fixture {
  Plan plan;
  std::vector<float> images, weight, latents;  // images [count, pixels]
  int count, pixels;

  Fixture(int count_, Shape shape) : count(count_), pixels(int(shape.elements())) {
    Layer layer;
    layer.kind = Kind::kLinear;
    layer.in = {count, 1, 1};
    layer.out = shape;
    layer.weight = 0;
    plan.layers = {layer};
    plan.image = shape;
    for (int i = 0; i < count * pixels; ++i) images.push_back(float(between(-2, 2)));
    images[0] = float(nearest::kLevels);  // sets the scale to one level a unit
    weight.resize(images.size());
    for (int i = 0; i < count; ++i)
      for (int p = 0; p < pixels; ++p) weight[size_t(p * count + i)] = images[size_t(i * pixels + p)];
    latents.resize(size_t(count) * size_t(count));
    for (int i = 0; i < count; ++i) latents[size_t(i * count + i)] = 1.0f;
  }

  std::vector<int64_t> wanted(const float* image, const int64_t* draw, int restarts) const {
    struct Entry {
      bool last;
      double distance;
      int64_t index;
      bool operator<(const Entry& o) const {
        if (last != o.last) return o.last;
        return distance != o.distance ? distance < o.distance : index < o.index;
      }
    };
    bool finite = true;
    for (int p = 0; p < pixels; ++p) finite = finite && std::isfinite(image[p]);
    std::vector<Entry> all;
    for (int i = 0; i < count; ++i) {
      double distance = 0;
      for (int p = 0; p < pixels; ++p) distance += std::pow(double(image[p]) - images[size_t(i * pixels + p)], 2);
      const bool drawn = !draw || nearest::takes_part(nearest::drawn_bits(*draw, i / 128), i);
      all.push_back({finite && !drawn, finite ? distance : 0, i});
    }
    std::sort(all.begin(), all.end());
    std::vector<int64_t> indices;
    for (int r = 0; r < restarts; ++r) indices.push_back(all[size_t(r)].index);
    return indices;
  }
};

void check_search(const char* set, int count, Shape shape, int batch, int threads) {
  const Fixture f(count, shape);
  const auto packed =
      pack(f.plan, {{f.weight.data(), int64_t(f.weight.size())}}, instruction_set(set), Precision::kFloat32);
  const auto candidates = decode_candidates(f.plan, *packed, f.latents.data(), count, threads);
  std::vector<float> images;
  std::vector<int64_t> draws;
  for (int i = 0; i < batch * f.pixels; ++i) images.push_back(float(between(-2, 2)));
  for (int i = 0; i < batch; ++i) draws.push_back(int64_t(rng()) << 31);
  if (batch > 2) images[size_t(2 * f.pixels)] = std::numeric_limits<float>::quiet_NaN();
  for (const int restarts : {1, std::min(count, 7), count})
    for (const bool drawn : {false, true}) {
      std::vector<int64_t> found(size_t(batch * restarts), -1);
      find_nearest(*candidates,
                   {images.data(), drawn ? draws.data() : nullptr, batch, restarts, threads, found.data()});
      for (int i = 0; i < batch; ++i) {
        const auto wanted = f.wanted(images.data() + i * f.pixels, drawn ? &draws[size_t(i)] : nullptr, restarts);
        CHECK(std::equal(wanted.begin(), wanted.end(), found.begin() + i * restarts),
              "%s: image %d of %d, %d of %d candidates, %d pixels, %d threads, %s", set, i, batch, restarts, count,
              f.pixels, threads, drawn ? "drawn" : "all");
      }
    }
}

}  // namespace

int main() {
  for (const std::string& set : supported_instruction_sets()) {
    setenv("DEFGAN_CPU_ISA", set.c_str(), 1);
    check_search(set.c_str(), 1, {1, 1, 1}, 1, 1);
    check_search(set.c_str(), 16, {1, 5, 5}, 8, 2);
    check_search(set.c_str(), 37, {3, 4, 7}, 9, 3);
    check_search(set.c_str(), 133, {1, 9, 9}, 17, 5);
  }
  return report("nearest");
}
