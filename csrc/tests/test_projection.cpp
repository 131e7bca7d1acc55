// The projection on random plans, for every instruction set of the machine, against loops in double precision
// written from the index rules alone; the same bits for any batch, chunk and number of threads. Made to run under
// the address, undefined-behaviour and thread sanitizers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/division.h"
#include "../cpu/projection.h"
#include "../cpu/team.h"
#include "../cpu/workspace.h"
#include "check.h"

using namespace defgan;
using namespace defgan::cpu;

// The kernels' buffers come from here, and are counted.
static std::atomic<int64_t> allocated_bytes{0};
extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  void* data = nullptr;
  if (posix_memalign(&data, alignment, size) != 0) return nullptr;
  allocated_bytes += int64_t(size);
  return data;
}

namespace {

std::mt19937 rng(7);
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
float normal(double deviation) { return float(std::normal_distribution<double>(0, deviation)(rng)); }

struct Network {
  Plan plan;
  std::vector<std::vector<float>> tensors;
  std::vector<Parameter> parameters() const {
    std::vector<Parameter> views;
    for (const auto& t : tensors) views.push_back({t.data(), int64_t(t.size())});
    return views;
  }
};

int add(Network& n, int64_t count, double deviation, double mean = 0) {
  n.tensors.emplace_back();
  for (int64_t i = 0; i < count; ++i) n.tensors.back().push_back(float(mean + normal(deviation)));
  return int(n.tensors.size()) - 1;
}

void add_norm(Network& n, Layer& l, int64_t count) {
  l.norm.mean = add(n, count, 0.2);
  l.norm.var = add(n, count, 0.1, 1);
  for (float& v : n.tensors.back()) v = std::fabs(v) + 0.3f;
  l.norm.weight = add(n, count, 0.2, 1);
  l.norm.bias = between(0, 1) ? add(n, count, 0.2) : -1;
  l.norm.eps = 1e-5;
}

Activation random_activation() {
  const Activation all[] = {Activation::kIdentity, Activation::kRelu, Activation::kLeakyRelu, Activation::kSigmoid,
                            Activation::kTanh};
  return all[between(0, 4)];
}

Network random_network() {
  Network n;
  const int k = between(1, 40);
  Shape shape{k, 1, 1};
  const int layers = between(1, 5);
  for (int i = 0; i < layers; ++i) {
    Layer l;
    l.in = shape;
    const int choice = i == 0 && between(0, 1) ? 0 : between(0, 5);  // a first layer is often, but not always, Linear
    if (choice == 0 || (i > 0 && shape.positions() == 1)) {
      l.kind = Kind::kLinear;
      l.out = between(0, 2) ? Shape{between(1, 40), between(1, 4), between(1, 4)} : Shape{between(1, 90), 1, 1};
      l.weight = add(n, l.in.elements() * l.out.elements(), 1.2 / std::sqrt(double(l.in.elements())));
      l.bias = between(0, 1) ? add(n, l.out.elements(), 0.3) : -1;
      if (between(0, 2) == 0) add_norm(n, l, between(0, 1) ? l.out.elements() : l.out.c);
    } else if (choice <= 2) {
      l.kind = Kind::kConvTranspose;
      l.kernel = {between(1, 5), between(1, 5)};
      l.stride = {between(1, 3), between(1, 3)};
      l.pad = {between(-1, 2), between(-1, 2)};
      l.out = {between(1, 40), std::min(14, std::max(1, (l.in.h - 1) * l.stride.h + l.kernel.h - between(0, 3))),
               std::min(30, std::max(1, (l.in.w - 1) * l.stride.w + l.kernel.w - between(0, 3)))};
    } else if (choice == 3) {
      l.kind = Kind::kConv;
      l.kernel = {between(1, 5), between(1, 4)};
      l.stride = {between(1, 2), between(1, 2)};
      l.upsample = {between(1, 3), between(1, 2)};
      l.pad = {between(0, 2), between(-1, 2)};
      l.out = {between(1, 40), std::max(1, l.in.h * l.upsample.h / l.stride.h - between(0, 1)),
               std::max(1, l.in.w * l.upsample.w / l.stride.w - between(0, 1))};
    } else if (choice == 4) {
      l.kind = Kind::kMap;
      l.upsample = {between(1, 2), between(1, 3)};
      l.pad = {between(0, std::min(1, l.in.h - 1)), 0};
      l.out = {l.in.c, std::max(1, l.in.h * l.upsample.h - l.pad.h - between(0, 1)), l.in.w * l.upsample.w};
      if (between(0, 1)) add_norm(n, l, l.out.c);
    } else {
      l.kind = Kind::kReorder;
      l.out = {l.in.h, l.in.w, l.in.c};
    }
    if (l.kind == Kind::kConv || l.kind == Kind::kConvTranspose) {
      const int64_t taps = int64_t(l.kernel.h) * l.kernel.w;
      l.weight = add(n, taps * l.in.c * l.out.c, 1.2 / std::sqrt(double(l.in.c) * std::max(1.0, taps / 3.0)));
      l.bias = between(0, 1) ? add(n, l.out.c, 0.3) : -1;
      if (between(0, 2) == 0) add_norm(n, l, l.out.c);
    }
    if (l.kind != Kind::kReorder) {
      l.activation = random_activation();
      l.slope = 0.2f;
    }
    n.plan.layers.push_back(l);
    shape = l.out;
  }
  n.plan.image = shape;
  return n;
}

// A layer whose kernel meets its source nowhere, since padding puts all of it beyond the border: no taps at all.
Network network_without_taps() {
  Network n;
  Layer first, cut;
  first.kind = Kind::kLinear;
  first.in = {5, 1, 1};
  first.out = cut.in = {35, 3, 1};
  first.weight = add(n, first.in.elements() * first.out.elements(), 0.5);
  cut.kind = Kind::kConv;
  cut.kernel = {4, 2};
  cut.stride = {2, 2};
  cut.pad = {1, 2};
  cut.upsample = {3, 1};
  cut.out = {11, 3, 1};
  cut.weight = add(n, int64_t(4 * 2 * 35 * 11), 0.5);
  cut.bias = add(n, 11, 0.5);
  Layer last;
  last.kind = Kind::kLinear;
  last.in = cut.out;
  last.out = {20, 1, 1};
  last.weight = add(n, last.in.elements() * last.out.elements(), 0.5);
  n.plan.layers = {first, cut, last};
  n.plan.image = last.out;
  return n;
}

// --- the same in double, position by position ------------------------------------------------------------

double apply(const Layer& l, double x) {
  switch (l.activation) {
    case Activation::kRelu: return x > 0 ? x : 0;
    case Activation::kLeakyRelu: return x > 0 ? x : double(l.slope) * x;
    case Activation::kSigmoid: return 1 / (1 + std::exp(-x));
    case Activation::kTanh: return std::tanh(x);
    default: return x;
  }
}
double derivative(const Layer& l, double y) {
  switch (l.activation) {
    case Activation::kRelu: return y > 0;
    case Activation::kLeakyRelu: return y > 0 ? 1 : double(l.slope);
    case Activation::kSigmoid: return y * (1 - y);
    case Activation::kTanh: return 1 - y * y;
    default: return 1;
  }
}

// use(input element, output element, weight) for every product of a layer
template <class Use>
void products(const Network& n, const Layer& l, const Use& use) {
  const auto in = [&](int c, int y, int x) { return (int64_t(c) * l.in.h + y) * l.in.w + x; };
  const auto out = [&](int c, int y, int x) { return (int64_t(c) * l.out.h + y) * l.out.w + x; };
  if (l.kind == Kind::kReorder) {
    for (int64_t e = 0; e < l.in.elements(); ++e) use(e, e, 1.0);
    return;
  }
  if (l.kind == Kind::kMap) {
    for (int c = 0; c < l.out.c; ++c)
      for (int y = 0; y < l.out.h; ++y)
        for (int x = 0; x < l.out.w; ++x)
          use(in(c, (y + l.pad.h) / l.upsample.h, (x + l.pad.w) / l.upsample.w), out(c, y, x), 1.0);
    return;
  }
  const std::vector<float>& w = n.tensors[size_t(l.weight)];
  if (l.kind == Kind::kLinear) {
    for (int64_t i = 0; i < l.in.elements(); ++i)
      for (int64_t o = 0; o < l.out.elements(); ++o) use(i, o, double(w[size_t(o * l.in.elements() + i)]));
    return;
  }
  for (int ci = 0; ci < l.in.c; ++ci)
    for (int co = 0; co < l.out.c; ++co)
      for (int ky = 0; ky < l.kernel.h; ++ky)
        for (int kx = 0; kx < l.kernel.w; ++kx) {
          const int64_t pair = l.kind == Kind::kConv ? int64_t(co) * l.in.c + ci : int64_t(ci) * l.out.c + co;
          const double weight = double(w[size_t((pair * l.kernel.h + ky) * l.kernel.w + kx)]);
          if (l.kind == Kind::kConvTranspose) {
            for (int y = 0; y < l.in.h; ++y)
              for (int x = 0; x < l.in.w; ++x) {
                const int oy = l.stride.h * y + ky - l.pad.h, ox = l.stride.w * x + kx - l.pad.w;
                if (oy >= 0 && oy < l.out.h && ox >= 0 && ox < l.out.w) use(in(ci, y, x), out(co, oy, ox), weight);
              }
          } else {
            for (int y = 0; y < l.out.h; ++y)
              for (int x = 0; x < l.out.w; ++x) {
                const int uy = l.stride.h * y + ky - l.pad.h, ux = l.stride.w * x + kx - l.pad.w;
                if (uy >= 0 && uy < l.in.h * l.upsample.h && ux >= 0 && ux < l.in.w * l.upsample.w)
                  use(in(ci, uy / l.upsample.h, ux / l.upsample.w), out(co, y, x), weight);
              }
          }
        }
}

struct Affine {
  double scale = 1, shift = 0;
};
Affine affine(const Network& n, const Layer& l, int64_t element) {
  if (!l.norm.present()) return {};
  const auto at = [&](int index) {
    const auto& t = n.tensors[size_t(index)];
    const bool per_element = int64_t(t.size()) == l.out.elements() && l.out.positions() > 1;
    return double(t[size_t(per_element ? element : element / l.out.positions())]);
  };
  const double scale = (l.norm.weight < 0 ? 1 : at(l.norm.weight)) / std::sqrt(at(l.norm.var) + l.norm.eps);
  return {scale, (l.norm.bias < 0 ? 0 : at(l.norm.bias)) - at(l.norm.mean) * scale};
}

std::vector<std::vector<double>> forward(const Network& n, const std::vector<double>& z) {
  std::vector<std::vector<double>> values = {z};
  for (const Layer& l : n.plan.layers) {
    std::vector<double> y(size_t(l.out.elements()), 0.0);
    products(n, l, [&](int64_t i, int64_t o, double w) { y[size_t(o)] += w * values.back()[size_t(i)]; });
    for (int64_t o = 0; o < l.out.elements(); ++o) {
      if (l.bias >= 0)
        y[size_t(o)] += double(n.tensors[size_t(l.bias)][size_t(l.kind == Kind::kLinear ? o : o / l.out.positions())]);
      const Affine a = affine(n, l, o);
      y[size_t(o)] = apply(l, y[size_t(o)] * a.scale + a.shift);
    }
    values.push_back(y);
  }
  return values;
}

std::vector<double> gradient(const Network& n, const std::vector<double>& z, const std::vector<float>& target) {
  const auto values = forward(n, z);
  std::vector<double> g(values.back().size());
  for (size_t i = 0; i < g.size(); ++i) g[i] = 2 * (values.back()[i] - double(target[i])) / double(g.size());
  for (size_t layer = n.plan.layers.size(); layer-- > 0;) {
    const Layer& l = n.plan.layers[layer];
    for (int64_t o = 0; o < l.out.elements(); ++o)
      g[size_t(o)] *= derivative(l, values[layer + 1][size_t(o)]) * affine(n, l, o).scale;
    std::vector<double> before(size_t(l.in.elements()), 0.0);
    products(n, l, [&](int64_t i, int64_t o, double w) { before[size_t(i)] += w * g[size_t(o)]; });
    g = before;
  }
  return g;
}

// --- the comparison --------------------------------------------------------------------------------------

struct Result {
  std::vector<float> latents, errors;
  bool operator==(const Result& o) const {
    return std::memcmp(latents.data(), o.latents.data(), latents.size() * 4) == 0 &&
           std::memcmp(errors.data(), o.errors.data(), errors.size() * 4) == 0;
  }
};

Result run(const PackedGenerator& g, const std::vector<float>& images, const std::vector<float>& start, int count,
           int restarts, const std::vector<float>& rates, int threads, int64_t max_rows) {
  Result r;
  r.latents.assign(size_t(count) * size_t(restarts) * size_t(g.plan.latent_size()), NAN);
  r.errors.assign(size_t(count) * size_t(restarts), NAN);
  ProjectArgs args{};
  args.images = images.data();
  args.start = start.data();
  args.start_per_image = false;
  args.images_count = count;
  args.restarts = restarts;
  args.descent.rates = rates.data();
  args.descent.steps = int(rates.size());
  args.descent.momentum = 0.7f;
  args.threads = threads;
  args.max_rows = max_rows;
  args.latents = r.latents.data();
  args.errors = r.errors.data();
  project(g, args);
  return r;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void compare(const Network& n, const InstructionSet& set, int trial) {
  rng.seed(unsigned(trial));  // the same problem for every set, and on machines with fewer of them
  // Every tenth problem has 35 rows, of which a thread makes blocks of 17 and 18 where a tile is that large.
  const bool many = trial % 10 == 0;
  const int k = n.plan.latent_size(), count = many ? 5 : between(1, 4), restarts = many ? 7 : between(1, 9);
  const size_t pixels = size_t(n.plan.image.elements());
  std::vector<float> images, start;
  for (size_t i = 0; i < size_t(count) * pixels; ++i) images.push_back(normal(0.5));
  for (int i = 0; i < restarts * k; ++i) start.push_back(normal(1 / std::sqrt(double(k))));
  const auto packed = pack(n.plan, n.parameters(), set, Precision::kFloat32);
  const auto narrow = pack(n.plan, n.parameters(), set, Precision::kBfloat16);

  // One step with a rate that moves a latent by about its length: start - latent = rate * gradient.
  const float rate = 5.0f;
  const Result one = run(*packed, images, start, count, restarts, {rate}, 1, 0);
  const Result coarse = run(*narrow, images, start, count, restarts, {rate}, 1, 0);
  std::vector<double> gaps, coarse_gaps, losses;
  for (int row = 0; row < count * restarts; ++row) {
    const std::vector<double> z(start.begin() + row % restarts * k, start.begin() + (row % restarts + 1) * k);
    const std::vector<float> target(images.begin() + int64_t(row / restarts) * int64_t(pixels),
                                    images.begin() + int64_t(row / restarts + 1) * int64_t(pixels));
    const auto g = gradient(n, z, target);
    double gap = 0, coarse_gap = 0, norm = 1e-30;
    std::vector<double> moved;
    for (int i = 0; i < k; ++i) {
      const size_t at = size_t(row) * size_t(k) + size_t(i);
      const double expected = z[size_t(i)] - double(rate) * g[size_t(i)];
      gap += std::pow(double(one.latents[at]) - expected, 2);
      coarse_gap += std::pow(double(coarse.latents[at]) - expected, 2);
      norm += std::pow(double(rate) * g[size_t(i)], 2) + 1e-6 * z[size_t(i)] * z[size_t(i)];
      moved.push_back(double(one.latents[at]));
    }
    gaps.push_back(std::sqrt(gap / norm));
    coarse_gaps.push_back(std::sqrt(coarse_gap / norm));
    const auto image = forward(n, moved).back();
    double loss = 0;
    for (size_t p = 0; p < pixels; ++p) loss += std::pow(image[p] - double(target[p]), 2) / double(pixels);
    losses.push_back(std::fabs(double(one.errors[size_t(row)]) - loss) / (loss + 1e-9));
  }
  CHECK(median(gaps) < 1e-4, "%s, trial %d: gradient off by %g", set.name, trial, median(gaps));
  CHECK(median(losses) < 1e-5, "%s, trial %d: loss off by %g", set.name, trial, median(losses));
  CHECK(median(coarse_gaps) < 0.3, "%s, trial %d: bfloat16 gradient off by %g", set.name, trial, median(coarse_gaps));

  const std::vector<float> rates = {0.5f, 0.5f, 0.1f};
  for (const auto& g : {packed, narrow}) {
    const Result whole = run(*g, images, start, count, restarts, rates, 1, 0);
    for (const int threads : {2, 3, 4})
      CHECK(run(*g, images, start, count, restarts, rates, threads, 0) == whole, "%s, trial %d: %d threads", set.name,
            trial, threads);
    for (const int64_t max_rows : {1, 2, 5})
      CHECK(run(*g, images, start, count, restarts, rates, 2, max_rows) == whole, "%s, trial %d: max_rows %d", set.name,
            trial, int(max_rows));
    std::vector<float> decoded(size_t(count * restarts) * pixels, NAN), single(pixels, NAN);
    decode(*g, whole.latents.data(), count * restarts, 2, 0, decoded.data());
    for (int row = 0; row < count * restarts; ++row) {
      decode(*g, whole.latents.data() + int64_t(row) * k, 1, 1, 0, single.data());
      CHECK(std::memcmp(single.data(), decoded.data() + size_t(row) * pixels, pixels * 4) == 0, "%s, trial %d: decode",
            set.name, trial);
    }
  }
}

// A gradient below float32's normal numbers is zero inside of a projection, whatever a thread's own setting, and the
// caller's setting is what it was.
void flush_denormals() {
#if defined(__x86_64__)
  Network n;
  Layer l;
  l.kind = Kind::kLinear;
  l.in = l.out = {1, 1, 1};
  l.weight = add(n, 1, 0, 1e-20);
  n.plan.layers = {l};
  n.plan.image = l.out;
  const std::vector<float> images(2, 0.0f), start(3, 1.0f);
  volatile float denormal = 1e-40f;
  for (const std::string& name : supported_instruction_sets()) {
    const auto packed = pack(n.plan, n.parameters(), instruction_set(name), Precision::kFloat32);
    for (const int threads : {1, 2}) {
      // 2 * 1e-20 * 1e-20: a step of this rate would show it
      const Result r = run(*packed, images, start, 2, 3, {1e38f}, threads, 0);
      for (const float z : r.latents) CHECK(z == 1.0f, "%s, %d threads: moved to %g", name.c_str(), threads, double(z));
      CHECK(denormal * 0.5f > 0.0f, "%s, %d threads: the caller's setting was changed", name.c_str(), threads);
    }
  }
#endif
}

// A team's threads are those of a named pool where it gives them, and its own where it does not; the same bits.
bool pool_gives;
int pool_asked, pool_gave;

bool pool(int threads, const std::function<void(int)>& body) {
  pool_asked += threads;
  if (!pool_gives) return false;
  pool_gave += threads;
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id) others.emplace_back(body, id);
  body(0);
  for (std::thread& other : others) other.join();
  return true;
}

void threads_of_a_pool() {
  const Network n = random_network();
  const int k = n.plan.latent_size(), restarts = 5;
  std::vector<float> images(size_t(n.plan.image.elements())), start(size_t(restarts * k));
  for (float& x : images) x = normal(0.5);
  for (float& x : start) x = normal(1);
  const auto packed = pack(n.plan, n.parameters(), active_instruction_set(), Precision::kFloat32);
  const auto project_on = [&](int threads) { return run(*packed, images, start, 1, restarts, {0.5f}, threads, 0); };
  const Result expected = project_on(1);
  use_pool(pool);
  for (const bool gives : {true, false}) {
    pool_gives = gives;
    pool_asked = pool_gave = 0;
    CHECK(project_on(1) == expected && pool_asked == 0, "one thread: a pool was asked for %d", pool_asked);
    CHECK(project_on(3) == expected, "three threads of a pool: other bits");
    CHECK(pool_asked == 3 && pool_gave == (gives ? 3 : 0), "a pool was asked for %d threads, gave %d", pool_asked,
          pool_gave);
  }
  use_pool(nullptr);
  CHECK(project_on(3) == expected && pool_asked == 3, "a pool was asked after it was taken away");
}

// One row of it takes 3 MB.
Network network_of_large_images() {
  Network n;
  Layer first, last;
  first.kind = Kind::kLinear;
  first.in = {8, 1, 1};
  first.out = last.in = {32, 64, 64};
  first.weight = add(n, first.in.elements() * first.out.elements(), 0.5);
  first.activation = Activation::kTanh;
  last.kind = Kind::kConv;
  last.kernel = {3, 3};
  last.pad = {1, 1};
  last.out = {3, 64, 64};
  last.weight = add(n, 3 * 3 * 32 * 3, 0.5);
  n.plan.layers = {first, last};
  n.plan.image = last.out;
  return n;
}

// The bound of a workspace is what it allocates, and a division keeps the workspaces of all teams below 200 MB.
void workspace_is_bounded() {
  for (int trial = 0; trial < 20; ++trial) {
    rng.seed(unsigned(trial) + 7);
    const Network n = trial == 0 ? network_of_large_images() : random_network();
    for (const Precision precision : {Precision::kFloat32, Precision::kBfloat16}) {
      const auto packed = pack(n.plan, n.parameters(), active_instruction_set(), precision);
      for (const int rows : {1, 2, 7, 30}) {
        const int64_t before = allocated_bytes;
        const Workspace workspace(*packed, rows);
        const int64_t taken = allocated_bytes - before, bound = workspace_bytes(*packed, rows);
        CHECK(taken == bound, "trial %d, %d rows: %lld bytes were allocated, %lld bounded", trial, rows,
              (long long)(taken), (long long)(bound));
      }
      for (const int threads : {1, 2, 7, 24, 64}) {
        const Division division = divide(*packed, 4000, threads, 0);
        const int64_t all = division.teams * workspace_bytes(*packed, division.group_rows);
        CHECK(all <= 200 << 20 || division.group_rows == 1, "trial %d, %d threads: %d teams of %d rows take %lld bytes",
              trial, threads, division.teams, division.group_rows, (long long)(all));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int trials = argc > 1 ? std::atoi(argv[1]) : 60;
  for (int trial = 0; trial < trials; ++trial) {
    rng.seed(unsigned(trial) + 7);
    const Network network = trial == 0 ? network_without_taps() : random_network();
    const int before = failures();
    for (const std::string& name : supported_instruction_sets()) {
      InstructionSet set = instruction_set(name);
      KernelTable float32 = *set.float32, bfloat16 = *set.bfloat16;
      // These networks are too small for weights to be fetched ahead where that is a choice: every second one has it so.
      if (trial % 2 == 1) float32.ahead_bytes = bfloat16.ahead_bytes = 0;
      set.float32 = &float32;
      set.bfloat16 = &bfloat16;
      compare(network, set, trial);
    }
    if (failures() == before) continue;
    std::printf("trial %d was\n", trial);
    for (const Layer& l : network.plan.layers)
      std::printf("  %s %dx%dx%d -> %dx%dx%d kernel %dx%d stride %dx%d pad %dx%d upsample %dx%d %s bias %d norm %d\n",
                  name_of(l.kind), l.in.c, l.in.h, l.in.w, l.out.c, l.out.h, l.out.w, l.kernel.h, l.kernel.w,
                  l.stride.h, l.stride.w, l.pad.h, l.pad.w, l.upsample.h, l.upsample.w, name_of(l.activation), l.bias,
                  l.norm.mean);
  }
  flush_denormals();
  threads_of_a_pool();
  workspace_is_bounded();
  return report("test_projection");
}
