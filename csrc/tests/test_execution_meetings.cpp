// Barriers of warps, blocks and teams in the CPU execution of kernels: what each of them orders, and what happens where
// threads do not meet. Every rule of docs/gpu.md has a kernel that keeps it and twins with one planted mistake each.
#include <cstring>

#include "execution.h"

namespace {

enum class Barrier { kNone, kWarp, kBlock };
void meet(Barrier barrier) {
  if (barrier == Barrier::kWarp) sync_warp();
  if (barrier == Barrier::kBlock) sync_block();
}

// Every thread writes its word, reads that of the thread `distance` on, and writes its own again.
void exchange_in_block(int distance, Barrier before_load, Barrier before_second_store) {
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());
  const int me = thread_index(), other = (me + distance) % block_threads();
  store_shared(words + me, static_cast<uint32_t>(me));
  meet(before_load);
  const uint32_t got = load_shared(words + other);
  meet(before_second_store);
  store_shared(words + me, got);
  CHECK(got == static_cast<uint32_t>(other), "%d got %u", me, got);
}

void block_and_warp_barriers() {
  const Shape warp{1, 32, 128, false}, block{2, 128, 512, false};
  const auto run = [](const char* name, std::vector<std::string> phrases, Shape shape, int distance, Barrier first,
                      Barrier second) {
    expect_shared(name, std::move(phrases), shape, [&] { exchange_in_block(distance, first, second); });
  };
  run("block", {""}, block, 37, Barrier::kBlock, Barrier::kBlock);
  run("block, none before load", {"race", "nothing has written"}, block, 37, Barrier::kNone, Barrier::kBlock);
  run("block, none before store", {"race"}, block, 37, Barrier::kBlock, Barrier::kNone);
  run("block, a warp's before load", {"race", "nothing has written"}, block, 37, Barrier::kWarp, Barrier::kBlock);
  run("block, a warp's before store", {"race"}, block, 37, Barrier::kBlock, Barrier::kWarp);
  run("warp", {""}, warp, 1, Barrier::kWarp, Barrier::kWarp);
  run("warp, a block's", {""}, warp, 1, Barrier::kBlock, Barrier::kBlock);
  run("warp, none before load", {"race", "nothing has written"}, warp, 1, Barrier::kNone, Barrier::kWarp);
  run("warp, none before store", {"race"}, warp, 1, Barrier::kWarp, Barrier::kNone);
}

// A word that many have read is written by one of them; `barrier` orders it after the others.
void readers_before_a_writer() {
  const auto kernel = [](int writer, Barrier barrier) {
    auto* word = reinterpret_cast<uint32_t*>(shared_memory());
    if (thread_index() == 0) store_shared(word, 7u);
    sync_block();
    load_shared(word);
    meet(barrier);
    if (thread_index() == writer) store_shared(word, 8u);
  };
  for (const int writer : {0, 31, 32, 63, 5}) {
    for (const int threads : {32, 64}) {
      const Shape shape{1, threads, 16, false};
      if (writer >= threads) continue;
      const bool one_warp = threads == 32;
      expect_shared("readers, block", {""}, shape, [&] { kernel(writer, Barrier::kBlock); });
      expect_shared("readers, none", {"race"}, shape, [&] { kernel(writer, Barrier::kNone); });
      expect_shared("readers, warp", {one_warp ? "" : "race"}, shape, [&] { kernel(writer, Barrier::kWarp); });
    }
  }
}

// Teams of `team` blocks; every block writes a row, reads that of the next block of its team, and writes it again.
struct TeamExchange {
  int blocks = 4, team = 4;
  bool before_load = true, before_store = true, zeroed = true, cooperative = true, neighbour_team = false;
  int expected_blocks = 0;  // what the kernel passes, where not `team`

  void kernel(uint32_t* rows, TeamBarrier* barriers) const {
    const int threads = block_threads(), me = thread_index(), block = block_index();
    const int first = block / team * team,
              next = neighbour_team ? (block + team) % blocks : first + (block - first + 1) % team;
    const auto value = [&](int b) { return static_cast<uint32_t>(1000 * b + me); };
    const auto meet_team = [&](bool wanted) {
      if (wanted)
        sync_team(barriers + block / team, expected_blocks != 0 ? expected_blocks : team);
      else
        sync_block();
    };
    store_global(rows + block * threads + me, value(block));
    meet_team(before_load);
    const uint32_t got = load_global(rows + next * threads + me);
    meet_team(before_store);
    store_global(rows + block * threads + me, got);
    CHECK(got == value(next), "block %d thread %d got %u", block, me, got);
  }

  void expect(const char* name, std::vector<std::string> phrases) const {
    ::expect(name, std::move(phrases), [&](uint64_t seed) {
      const int threads = 64;
      std::vector<uint32_t> rows(static_cast<size_t>(blocks * threads));
      std::vector<TeamBarrier> barriers(static_cast<size_t>(blocks));
      Memory memory;
      memory.add("rows", rows.data(), rows.size() * 4, false);
      memory.add("barriers", barriers.data(), barriers.size() * sizeof(TeamBarrier), false);
      std::memset(barriers.data(), zeroed ? 0 : 1, barriers.size() * sizeof(TeamBarrier));
      memory.mark_initialised(barriers.data(), barriers.size() * sizeof(TeamBarrier));
      const std::string message =
          outcome(memory, {blocks, threads, 0, cooperative}, [&] { kernel(rows.data(), barriers.data()); }, seed);
      if (message.empty())
        for (int t = 0; t < blocks / team; ++t)
          CHECK(barriers[t].arrivals == static_cast<uint32_t>(2 * team), "%u arrivals", barriers[t].arrivals);
      return message;
    });
  }
};

void team_barriers() {
  TeamExchange grid;
  grid.expect("grid", {""});
  TeamExchange pairs;
  pairs.team = 2;
  pairs.expect("pairs", {""});
  TeamExchange bug = grid;
  bug.before_load = false;
  bug.expect("none before load", {"race", "nothing has written"});
  bug = grid;
  bug.before_store = false;
  bug.expect("none before store", {"race"});
  bug = pairs;
  bug.neighbour_team = true;
  bug.expect("a row of another team", {"race", "nothing has written"});
  bug = grid;
  bug.zeroed = false;
  bug.expect("barrier not zero", {"not zero"});
  bug = grid;
  bug.cooperative = false;
  bug.expect("not cooperative", {"not cooperative"});
  bug = grid;
  bug.expected_blocks = 3;
  bug.expect("more blocks than the team", {"more blocks", "race", "nothing has written"});
  bug = pairs;
  bug.expected_blocks = 3;
  bug.expect("fewer blocks than the team", {"deadlock"});
}

// Block 0 meets 1, then 1 meets 2: what 0 wrote before, 2 may read after. Not so where 1 meets 2 first.
void order_through_others() {
  const auto run = [](bool in_order, uint64_t seed) {
    std::vector<TeamBarrier> barriers(2);
    std::vector<uint32_t> word(1);
    Memory memory;
    memory.add("word", word.data(), 4, true);
    memory.add("barriers", barriers.data(), barriers.size() * sizeof(TeamBarrier), true);
    return outcome(
        memory, {3, 32, 0, true},
        [&] {
          const int first = in_order ? 0 : 1;
          if (block_index() == 0 && thread_index() == 3) store_global(word.data(), 5u);
          for (int pair = 0; pair < 2; ++pair) {
            const int low = pair == 0 ? first : 1 - first;
            if (block_index() == low || block_index() == low + 1) sync_team(&barriers[low], 2);
          }
          if (block_index() == 2 && thread_index() == 9) load_global(word.data());
        },
        seed);
  };
  expect("through another block", {""}, [&](uint64_t seed) { return run(true, seed); });
  expect("through another block, too early", {"race"}, [&](uint64_t seed) { return run(false, seed); });
}

// ---- meetings that do not come about

void partings() {
  const Shape warp{1, 32, 0, false}, block{1, 64, 0, false};
  expect_shared("different collectives", {"lanes of one warp part"}, warp, [] {
    if (thread_index() < 16)
      shuffle_xor(1.0f, 1);
    else
      sync_warp();
  });
  expect_shared("different places", {"lanes of one warp part"}, warp, [] {
    if (thread_index() < 16)
      sync_warp();
    else
      sync_warp();
  });
  expect_shared("a lane leaves early", {"ended", "ends while"}, warp, [] {
    if (thread_index() == 7) return;
    sync_warp();
  });
  expect_shared("a lane makes one more round", {"ended", "ends while"}, warp, [] {
    for (int i = 0; i < (thread_index() == 0 ? 3 : 2); ++i) sync_warp();
  });
  expect_shared("a warp leaves early", {"ended", "ends while"}, block, [] {
    if (thread_index() >= 32) return;
    sync_block();
  });
  expect_shared("warps at different places", {"threads of one block part"}, block, [] {
    if (thread_index() >= 32)
      sync_block();
    else
      sync_block();
  });
  expect_shared("lane 0 skips a shuffle", {"deadlock: nobody can go on; "}, warp, [] {
    if (thread_index() != 0) shuffle_xor(1.0f, 1);
    sync_block();
  });
  // The report names everybody's place once.
  Memory memory;
  const std::string message = outcome(
      memory, warp,
      [] {
        if (thread_index() != 4) shuffle_xor(1.0f, 1);
        sync_block();
      },
      0);
  for (const char* part : {"31 wait in shuffle_xor at test_execution_meetings.cpp:", "(thread 0 of block 0 and others)",
                           "1 wait in sync_block at test_execution_meetings.cpp:", "(thread 4 of block 0)"})
    CHECK(message.find(part) != std::string::npos, "'%s' lacks '%s'", message.c_str(), part);
}

}  // namespace

int main() {
  block_and_warp_barriers();
  readers_before_a_writer();
  team_barriers();
  order_through_others();
  partings();
  return report_execution("execution, meetings");
}
