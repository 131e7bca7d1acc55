// Threads of a call: how many the machine allows, how they end early and together, and how they wait for each other.
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/cores.h"
#include "../cpu/nearest.h"
#include "../cpu/projection.h"
#include "../cpu/team.h"
#include "check.h"

using namespace defgan;
using namespace defgan::cpu;

namespace {

// --- cores that control groups allow ----------------------------------------------------------------------

constexpr int kUnlimited = 1 << 20;  // at least

class FakeRoot {
 public:
  FakeRoot() {
    char name[] = "/tmp/test_threads_XXXXXX";
    path = mkdtemp(name);
  }
  ~FakeRoot() { (void)!std::system(("rm -r '" + path + "'").c_str()); }
  void write(const std::string& file, const std::string& text) const {
    for (size_t at = file.find('/', 1); at != std::string::npos; at = file.find('/', at + 1))
      mkdir((path + file.substr(0, at)).c_str(), 0700);
    std::ofstream(path + file) << text << "\n";
  }
  std::string path;
};

const char* const kUnifiedMount = "30 23 0:26 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate";
const char* const kLegacyMount = "32 31 0:29 /docker/a /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct";

void quota_of_version_2() {
  const FakeRoot root;
  CHECK(cores_of_quota(root.path) >= kUnlimited, "a limit without /proc");
  root.write("/proc/self/mountinfo", std::string("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n") + kUnifiedMount);
  root.write("/proc/self/cgroup", "0::/user.slice/job");
  CHECK(cores_of_quota(root.path) >= kUnlimited, "a limit without files");
  root.write("/sys/fs/cgroup/user.slice/job/cpu.max", "max 100000");
  CHECK(cores_of_quota(root.path) >= kUnlimited, "a limit where it is max");
  root.write("/sys/fs/cgroup/user.slice/cpu.max", "250000 100000");
  CHECK(cores_of_quota(root.path) == 3, "the parent's two and a half: %d", cores_of_quota(root.path));
  root.write("/sys/fs/cgroup/user.slice/job/cpu.max", "20000 100000");
  CHECK(cores_of_quota(root.path) == 1, "a fifth of a core: %d", cores_of_quota(root.path));
  root.write("/sys/fs/cgroup/user.slice/job/cpu.max", "nonsense");
  CHECK(cores_of_quota(root.path) == 3, "a file that nobody can read: %d", cores_of_quota(root.path));
}

// Seen from a container: its own group is the one mounted, under the host's path or under none.
void quota_of_version_1() {
  for (const char* group : {"4:cpu,cpuacct:/docker/a", "4:cpu,cpuacct:/", "4:cpu,cpuacct:/docker/a/inner"}) {
    const FakeRoot root;
    root.write("/proc/self/mountinfo",
               std::string("31 30 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n") + kLegacyMount);
    root.write("/proc/self/cgroup", std::string("5:cpuset:/\n") + group);
    root.write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1");
    root.write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
    CHECK(cores_of_quota(root.path) >= kUnlimited, "%s: a limit where it is -1", group);
    root.write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000");
    CHECK(cores_of_quota(root.path) == 4, "%s: %d", group, cores_of_quota(root.path));
  }
}

// --- interruption -----------------------------------------------------------------------------------------

struct Stop : std::runtime_error {
  Stop() : std::runtime_error("stop") {}
};

std::atomic<int> questions{0};
int stop_at = 0;  // the question that ends the call
volatile float smallest_normal = 1.17549435e-38f;

std::exception_ptr question() {
  CHECK(smallest_normal * 0.5f > 0.0f, "a question is asked while subnormal numbers are flushed");
  return ++questions < stop_at ? nullptr : std::make_exception_ptr(Stop());
}

// Whether the work was stopped by that question. On a new thread, whose first question is asked at once.
bool stopped(int at, const std::function<void()>& work) {
  bool caught = false;
  questions = 0;
  stop_at = at;
  use_question(question);
  std::thread([&] {
    try {
      work();
    } catch (const Stop&) {
      caught = true;
    }
  }).join();
  use_question(nullptr);
  CHECK(!caught || questions == at, "asked %d times, though the answer to question %d was to stop", int(questions), at);
  return caught;
}

struct Problem {
  Plan plan;
  std::vector<float> weight, images, start;
  std::shared_ptr<const PackedGenerator> packed;

  Problem() {
    Layer first, last;
    first.kind = last.kind = Kind::kLinear;
    first.in = {5, 1, 1};
    first.out = last.in = {40, 2, 2};
    first.activation = Activation::kLeakyRelu;
    first.slope = 0.2f;
    last.out = {1, 6, 6};
    last.activation = Activation::kSigmoid;
    first.weight = last.weight = 0;
    last.weight = 1;
    plan.layers = {first, last};
    plan.image = last.out;
    std::vector<float> second(size_t(last.weight_elements()));
    weight.resize(size_t(first.weight_elements()));
    unsigned state = 1;
    const auto fill = [&state](std::vector<float>& to, float scale) {
      for (float& x : to) x = scale * (float((state = state * 1664525u + 1013904223u) >> 8) / float(1 << 24) - 0.5f);
    };
    fill(weight, 1.0f);
    fill(second, 0.5f);
    const std::vector<Parameter> views{{weight.data(), int64_t(weight.size())},
                                       {second.data(), int64_t(second.size())}};
    packed = pack(plan, views, active_instruction_set(), Precision::kFloat32);
    images.resize(size_t(8 * plan.image.elements()));
    start.resize(size_t(8 * plan.latent_size()));
    fill(images, 1.0f);
    fill(start, 2.0f);
  }

  std::vector<float> project(int64_t images_count, int restarts, int steps, int threads) const {
    std::vector<float> rates(size_t(steps), 0.5f), latents(size_t(images_count * restarts * plan.latent_size())),
        errors(size_t(images_count * restarts));
    ProjectArgs args{};
    args.images = images.data();
    args.start = start.data();
    args.images_count = images_count;
    args.restarts = restarts;
    args.descent.rates = rates.data();
    args.descent.steps = steps;
    args.descent.momentum = 0.7f;
    args.threads = threads;
    args.latents = latents.data();
    args.errors = errors.data();
    cpu::project(*packed, args);
    latents.insert(latents.end(), errors.begin(), errors.end());
    return latents;
  }
};

// Whatever the division into teams, at the first question and at a later one; and the next call has the same bits.
void projections_stop() {
  const Problem problem;
  constexpr int kForEver = 200'000'000;
  for (const auto& [images, restarts] : {std::pair<int, int>{1, 1}, {1, 3}, {8, 8}}) {
    const std::vector<float> expected = problem.project(images, restarts, 20, 1);
    for (const int threads : {1, 2, 3})
      for (const int at : {1, 2}) {
        CHECK(stopped(at, [&] { problem.project(images, restarts, kForEver, threads); }),
              "%d x %d rows on %d threads: not stopped", images, restarts, threads);
        CHECK(problem.project(images, restarts, 20, threads) == expected, "%d x %d rows on %d threads: other bits",
              images, restarts, threads);
      }
  }
}

void decoding_and_comparing_stop() {
  const Problem problem;
  constexpr int64_t kMany = 2'000'000;
  const std::vector<float> latents(size_t(kMany * problem.plan.latent_size()), 0.3f);
  std::vector<float> images(size_t(kMany * problem.plan.image.elements()));
  const auto candidates = decode_candidates(problem.plan, *problem.packed, latents.data(), 50'000, 1);
  std::vector<int64_t> indices(2000 * 2);
  for (const int threads : {1, 3}) {
    CHECK(stopped(1, [&] { decode(*problem.packed, latents.data(), kMany, threads, 0, images.data()); }),
          "decoding on %d threads: not stopped", threads);
    CHECK(stopped(1, [&] { decode_candidates(problem.plan, *problem.packed, latents.data(), kMany, threads); }),
          "decoding candidates on %d threads: not stopped", threads);
    NearestArgs args{};
    args.images = images.data();
    args.images_count = 2000;
    args.restarts = 2;
    args.threads = threads;
    args.indices = indices.data();
    CHECK(stopped(1, [&] { find_nearest(*candidates, args); }), "comparing on %d threads: not stopped", threads);
  }
}

// The calling thread asks for all, also when its own part was done long ago.
void asks_while_others_work() {
  bool in_time = false;
  CHECK(stopped(2,
                [&] {
                  Interruption interruption;
                  run_threads(2, interruption, [&](int id) {
                    if (id == 0) return interruption.ask();
                    for (int i = 0; i < 2000 && !in_time; ++i) {
                      std::this_thread::sleep_for(std::chrono::milliseconds(10));
                      in_time = interruption.heard();
                    }
                  });
                }) &&
            in_time,
        "nobody asked while another thread worked");
}

// --- waiting ----------------------------------------------------------------------------------------------

void crowded_teams_yield() {
  set_cores(1);
  const int64_t before = thread_counts().yields;
  {
    const Lease lease(2);
    Barrier barrier(2);
    run_threads(2, [&](int id) {
      if (id == 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      barrier.wait();
    });
  }
  CHECK(thread_counts().yields > before, "a thread of a crowded team waited without yielding");
  CHECK(thread_counts().most >= 2, "two threads were not counted");
}

}  // namespace

int main() {
  quota_of_version_2();
  quota_of_version_1();
  projections_stop();
  decoding_and_comparing_stop();
  asks_while_others_work();
  crowded_teams_yield();
  return report("test_threads");
}
