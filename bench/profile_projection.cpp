// Where a projection's time goes: `profile ROWS STEPS THREADS [bfloat16] < PLAN`, PLAN as `defgan_fast`'s
// lowering writes it (docs/cpu.md shows the command). Weights are random and scaled so that activations keep
// their spread. Each layer's share of the machine's own multiply-add rate, measured before and after, says what
// is missing and where.
#include <chrono>
#include <cmath>
#include <cstring>
#include <iostream>
#include <iterator>
#include <random>
#include <string>

#include "cpu/limits.h"
#include "cpu/projection.h"
#include "geometry.h"

using namespace defgan;
using namespace defgan::cpu;

namespace {

constexpr int kCalls = 20;

std::vector<std::vector<float>> random_weights(const Plan& plan) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> tensors;
  const auto set = [&](int index, int64_t count, float mean, float deviation) {
    if (index < 0) return;
    if (size_t(index) >= tensors.size()) tensors.resize(size_t(index) + 1);
    for (int64_t i = 0; i < count; ++i) tensors[size_t(index)].push_back(mean + deviation * normal(rng));
  };
  for (const Layer& l : plan.layers) {
    const bool linear = l.kind == Kind::kLinear;
    if (l.has_matrix()) {
      const double products = double(multiply_adds(l)) / double(l.out.elements());  // of one output element
      const int64_t weights =
          linear ? l.in.elements() * l.out.elements() : int64_t(l.kernel.h) * l.kernel.w * l.in.c * l.out.c;
      set(l.weight, weights, 0, float(std::sqrt(2 / products)));
      set(l.bias, linear ? l.out.elements() : l.out.c, 0, 0.1f);
    }
    if (!l.norm.present()) continue;
    set(l.norm.mean, l.out.c, 0, 0.1f);
    set(l.norm.var, l.out.c, 1, 0);
    set(l.norm.weight, l.out.c, 1, 0.1f);
    set(l.norm.bias, l.out.c, 0, 0.1f);
  }
  return tensors;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) {
    std::fprintf(stderr, "usage: profile ROWS STEPS THREADS [bfloat16] < PLAN\n");
    return 2;
  }
  const int rows = std::stoi(argv[1]), steps = std::stoi(argv[2]), threads = std::stoi(argv[3]);
  const Precision precision =
      argc > 4 && std::strcmp(argv[4], "bfloat16") == 0 ? Precision::kBfloat16 : Precision::kFloat32;
  const Plan plan = parse_plan({std::istreambuf_iterator<char>(std::cin), {}});
  const auto tensors = random_weights(plan);
  std::vector<Parameter> parameters;
  for (const auto& t : tensors) parameters.push_back({t.data(), int64_t(t.size())});
  const InstructionSet& set = active_instruction_set();
  const auto packed = pack(plan, parameters, set, precision);

  std::mt19937 rng(8);
  std::normal_distribution<float> normal;
  const int k = plan.latent_size();
  std::vector<float> start(size_t(rows) * size_t(k)), latents(start.size()), errors(static_cast<size_t>(rows));
  for (float& x : start) x = normal(rng) / std::sqrt(float(k));
  std::vector<float> image(size_t(plan.image.elements()));
  for (float& x : image) x = 0.5f + 0.2f * normal(rng);
  const std::vector<float> rates(size_t(steps), 0.01f);
  Profile profile;
  ProjectArgs args{};
  args.images = image.data();
  args.start = start.data();
  args.images_count = 1;
  args.restarts = rows;
  args.descent.rates = rates.data();
  args.descent.steps = steps;
  args.descent.momentum = 0.7f;
  args.threads = threads;
  args.latents = latents.data();
  args.errors = errors.data();
  // Others on the machine can only slow a call, so the fastest of several is taken, and the highest peak.
  double peak = 0, wall = 0;
  for (int call = 0; call < kCalls; ++call) {
    Profile times;
    args.profile = &times;
    peak = std::max(peak, multiply_add_limit(set, precision, threads, 0.02));
    const auto begin = std::chrono::steady_clock::now();
    project(*packed, args);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (call > 0 && seconds >= wall) continue;
    wall = seconds;
    profile = times;
  }

  // GFLOP per multiply-add of a row's pass. One more forward pass than backward ones: the one that finds the error.
  const double back = 2e-9 * rows * steps, forth = 2e-9 * rows * (steps + 1);
  const double all = wall * threads, useful = (forth + back) * double(multiply_adds(plan));
  std::printf("%s, %d rows, %d threads: %.3f ms a step, %.1f of %.1f GFLOP/s (%.1f%% of peak)\n", set.name, rows,
              threads, 1e3 * wall / steps, useful / wall, peak, 100 * useful / wall / peak);
  std::printf("%-44s %8s %8s %14s\n", "part", "time", "of peak", "lost to peak");
  double counted = 0;
  const auto line = [&](const std::string& name, double seconds, double work) {
    // Lost: the share of the whole that this part takes beyond what it would take at the peak.
    const double ideal = work / peak * threads;
    std::printf("%-44s %7.1f%%", name.c_str(), 100 * seconds / all);
    if (work > 0)
      std::printf(" %7.1f%%", 100 * ideal / seconds);
    else
      std::printf(" %8s", "");
    std::printf(" %13.1f%%\n", 100 * (seconds - ideal) / all);
    counted += seconds;
  };
  const auto describe = [&](const char* way, size_t n) {
    const Layer& l = plan.layers[n];
    const auto shape = [](const Shape& s) {
      return std::to_string(s.c) + "x" + std::to_string(s.h) + "x" + std::to_string(s.w);
    };
    return std::string(way) + " " + name_of(l.kind) + " " + shape(l.in) + " -> " + shape(l.out);
  };
  for (size_t n = 0; n < plan.layers.size(); ++n)
    line(describe("forward", n), profile.forward[n], forth * double(multiply_adds(plan.layers[n])));
  for (size_t n = plan.layers.size(); n-- > 0;)
    line(describe("backward", n), profile.backward[n], back * double(multiply_adds(plan.layers[n])));
  line("image: activation, error, scatter", profile.image, 0);
  line("latent: store, momentum step", profile.latent, 0);
  line("waiting in barriers", profile.waiting, 0);
  line("outside: starting threads, clocks", all - counted, 0);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
