// Whether two accesses race in the CPU execution of kernels, compared with a plain definition on random programs.
#include <random>

#include "execution.h"

namespace {

constexpr int kRandomPrograms = kSanitized ? 40 : 600;

// A random program: a list of steps, each an access of one thread or a barrier of a group. Two accesses race if they
// touch a common byte, one writes, their threads differ, and no chain of barriers leads from one to the other.
struct Step {
  enum Kind { kLoad, kStore, kWarp, kBlock, kPair, kAll } kind;
  int thread;         // of the launch; or of the group, its number
  int offset, bytes;  // of the access
};
constexpr int kBlocks = 4, kThreads = 64, kAll = kBlocks * kThreads, kArea = 24;

bool takes_part(const Step& step, int thread) {
  switch (step.kind) {
    case Step::kWarp: return thread / 32 == step.thread;
    case Step::kBlock: return thread / kThreads == step.thread;
    case Step::kPair: return thread / (2 * kThreads) == step.thread;
    case Step::kAll: return true;
    default: return thread == step.thread;
  }
}

bool races(const std::vector<Step>& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].kind > Step::kStore) continue;
    std::vector<bool> after(kAll, false);  // threads that have learned of access i
    after[steps[i].thread] = true;
    for (size_t j = i + 1; j < steps.size(); ++j) {
      const Step &a = steps[i], &b = steps[j];
      if (b.kind > Step::kStore) {
        bool known = false;
        for (int t = 0; t < kAll; ++t) known = known || (after[t] && takes_part(b, t));
        for (int t = 0; t < kAll && known; ++t)
          if (takes_part(b, t)) after[t] = true;
      } else if ((a.kind == Step::kStore || b.kind == Step::kStore) && !after[b.thread] &&
                 a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes) {
        return true;
      }
    }
  }
  return false;
}

template <class T>
void access(const Step& step, char* area) {
  T* p = reinterpret_cast<T*>(area + step.offset);
  if (step.kind == Step::kLoad)
    load_global(p);
  else
    store_global(p, T{});
}

void random_programs() {
  std::mt19937 random(3);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  int racing = 0;
  for (int program = 0; program < kRandomPrograms; ++program) {
    std::vector<Step> steps;
    // Few threads and few bytes, so that they often conflict.
    const int actors[] = {below(kAll), below(kAll), below(32), below(32), below(64)};
    const int length = 2 + below(14), barriers = 3 + below(10);
    for (int i = 0; i < length; ++i) {
      while (below(12) < barriers) {
        const auto kind = static_cast<Step::Kind>(Step::kWarp + below(4));
        const int groups = kind == Step::kWarp ? 8 : kind == Step::kBlock ? 4 : kind == Step::kPair ? 2 : 1;
        steps.push_back({kind, below(2) == 0 ? 0 : below(groups), 0, 0});
        if (below(2) == 0) break;
      }
      const int bytes = 1 << below(4);
      steps.push_back(
          {below(3) != 0 ? Step::kLoad : Step::kStore, actors[below(5)], below(kArea / bytes) * bytes, bytes});
    }
    const bool expected = races(steps);
    racing += expected;
    for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, static_cast<uint64_t>(program) + 2}) {
      alignas(16) char area[kArea] = {};
      std::vector<TeamBarrier> barriers_memory(3);
      Memory memory;
      memory.add("area", area, sizeof(area), true);
      memory.add("barriers", barriers_memory.data(), 3 * sizeof(TeamBarrier), true);
      const std::string message = outcome(
          memory, {kBlocks, kThreads, 0, true},
          [&] {
            const int me = block_index() * kThreads + thread_index();
            for (const Step& step : steps) {
              if (!takes_part(step, me)) continue;
              switch (step.kind) {
                case Step::kWarp: sync_warp(); break;
                case Step::kBlock: sync_block(); break;
                case Step::kPair: sync_team(&barriers_memory[step.thread], 2); break;
                case Step::kAll: sync_team(&barriers_memory[2], 4); break;
                default:
                  if (step.bytes == 1) access<uint8_t>(step, area);
                  if (step.bytes == 2) access<uint16_t>(step, area);
                  if (step.bytes == 4) access<uint32_t>(step, area);
                  if (step.bytes == 8) access<uint64_t>(step, area);
              }
            }
          },
          seed);
      const bool found = message.find("race") == 0;
      CHECK(found == expected && (found || message.empty()), "program %d, seed %d: %s, but '%s'", program, int(seed),
            expected ? "a race" : "no race", message.c_str());
    }
  }
  CHECK(racing > kRandomPrograms / 5 && racing < kRandomPrograms * 4 / 5, "%d of %d programs race", racing,
        kRandomPrograms);
}

}  // namespace

int main() {
  random_programs();
  return report_execution("execution, races");
}
