// The CPU execution of kernels (csrc/cuda/execution): every rule of docs/gpu.md has a kernel that keeps it
// and passes, and twins with one planted mistake each that fail with a message about it, in every order of threads
// that is tried. Whether two accesses race is also compared with a plain definition on random programs, and what the
// matrix instructions compute with the layouts that the PTX ISA gives.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/device.h"
#include "../cuda/execution/launch.h"
#include "check.h"

using namespace defgan::cuda;
using execution::Failure;
using execution::Memory;
using execution::Options;

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kSeeds = 2;
constexpr int kRandomPrograms = 40;
#else
constexpr uint64_t kSeeds = 12;
constexpr int kRandomPrograms = 600;
#endif

struct Shape {
  int blocks, threads;
  size_t shared_bytes;
  bool cooperative;
};

// The message of the failure, or "" where the kernel passes.
std::string outcome(Memory& memory, const Shape& shape, const std::function<void()>& kernel, uint64_t seed) {
  try {
    execution::launch(memory, shape.blocks, shape.threads, shape.shared_bytes, shape.cooperative, kernel,
                      Options{seed});
    return "";
  } catch (const Failure& failure) {
    return failure.what();
  }
}

// A test sets up its memory and launches, once for every order of threads. Expected: one of the phrases in the
// failure's message, "" for no failure.
void expect(const char* name, std::vector<std::string> phrases, const std::function<std::string(uint64_t)>& run) {
  for (uint64_t seed = 0; seed <= kSeeds; ++seed) {
    const std::string message = run(seed);
    const bool as_expected = std::any_of(phrases.begin(), phrases.end(), [&](const std::string& phrase) {
      return phrase.empty() ? message.empty() : message.find(phrase) != std::string::npos;
    });
    CHECK(as_expected, "%s, seed %d: expected '%s', got '%s'", name, int(seed), phrases[0].c_str(), message.c_str());
    if (!as_expected) return;
  }
}

// The same without global memory.
void expect_shared(const char* name, std::vector<std::string> phrases, const Shape& shape,
                   const std::function<void()>& kernel) {
  expect(name, std::move(phrases), [&](uint64_t seed) {
    Memory memory;
    return outcome(memory, shape, kernel, seed);
  });
}

// ---- barriers

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
  for (const char* part : {"31 wait in shuffle_xor at test_execution.cpp:", "(thread 0 of block 0 and others)",
                           "1 wait in sync_block at test_execution.cpp:", "(thread 4 of block 0)"})
    CHECK(message.find(part) != std::string::npos, "'%s' lacks '%s'", message.c_str(), part);
}

// ---- places

void bounds_and_alignment() {
  struct Case {
    const char* name;
    std::vector<std::string> phrases;
    std::function<void(char* global, char* shared)> access;
  };
  const auto at = [](char* base, int bytes) { return reinterpret_cast<Float4*>(base + bytes); };
  const auto word = [](char* base, int bytes) { return reinterpret_cast<float*>(base + bytes); };
  const std::vector<Case> cases = {
      {"last of global", {""}, [&](char* g, char*) { load_global(at(g, 240)); }},
      {"last of shared", {""}, [&](char*, char* s) { store_shared(at(s, 112), Float4{}); }},
      {"load past global", {"out of bounds"}, [&](char* g, char*) { load_global(word(g, 256)); }},
      {"vector across the end", {"out of bounds"}, [&](char* g, char*) { load_global(at(g, 248)); }},
      {"constant past global", {"out of bounds"}, [&](char* g, char*) { load_constant(word(g, 256)); }},
      {"store past global", {"out of bounds"}, [&](char* g, char*) { store_global(word(g, 256), 0.0f); }},
      {"load before global", {"out of bounds"}, [&](char* g, char*) { load_global(word(g, -4)); }},
      {"store past shared", {"out of bounds"}, [&](char*, char* s) { store_shared(word(s, 128), 0.0f); }},
      {"store before shared", {"out of bounds"}, [&](char*, char* s) { store_shared(word(s, -4), 0.0f); }},
      {"another block's shared", {"out of bounds"}, [&](char*, char* s) { store_shared(word(s, 256), 0.0f); }},
      {"global as shared", {"out of bounds"}, [&](char* g, char*) { load_shared(word(g, 0)); }},
      {"shared as global", {"out of bounds"}, [&](char*, char* s) { store_global(word(s, 0), 0.0f); }},
      {"memory nobody added",
       {"out of bounds"},
       [&](char*, char*) {
         float local = 0;
         load_global(&local);
       }},
      {"misaligned 16 bytes", {"not aligned"}, [&](char* g, char*) { load_global(at(g, 8)); }},
      {"misaligned 8 bytes", {"not aligned"}, [&](char* g, char*) { load_global(reinterpret_cast<uint64_t*>(g + 4)); }},
      {"misaligned 4 bytes", {"not aligned"}, [&](char* g, char*) { load_constant(word(g, 2)); }},
      {"misaligned shared", {"not aligned"}, [&](char*, char* s) { store_shared(at(s, 4), Float4{}); }},
      {"misaligned copy, from", {"not aligned"}, [&](char* g, char* s) { copy_async_16(s, g + 8); }},
      {"misaligned copy, to", {"not aligned"}, [&](char* g, char* s) { copy_async_16(s + 8, g); }},
      {"copy past shared", {"out of bounds"}, [&](char* g, char* s) { copy_async_16(s + 128, g); }},
      {"copy from past global", {"out of bounds"}, [&](char* g, char* s) { copy_async_16(s, g + 256); }},
  };
  for (const Case& c : cases)
    expect(c.name, c.phrases, [&](uint64_t seed) {
      alignas(16) char global[256] = {};
      Memory memory;
      memory.add("global", global, sizeof(global), true);
      return outcome(
          memory, {2, 32, 128, true},
          [&] {
            if (thread_index() == 3 && block_index() == 0) c.access(global, shared_memory());
          },
          seed);
    });
  for (const int offset : {0, 8})
    expect_shared("ldmatrix row", {offset == 0 ? "" : "not aligned"}, {1, 32, 1024, false}, [&] {
      store_shared(reinterpret_cast<Float4*>(shared_memory()) + thread_index(), Float4{});
      store_shared(reinterpret_cast<Float4*>(shared_memory()) + 32 + thread_index(), Float4{});
      sync_warp();
      uint32_t r[4];
      load_matrix_transposed(r, shared_memory() + 16 * thread_index() + offset);
    });
}

// An index that is off by one, where the neighbour belongs to another thread.
void wrong_index() {
  for (const int bug : {0, 1})
    expect_shared("index", {bug ? "race" : ""}, {1, 64, 4 * 65, false}, [&] {
      auto* words = reinterpret_cast<uint32_t*>(shared_memory());
      store_shared(words + thread_index(), 1u);
      if (thread_index() == 40) store_shared(words + thread_index() + bug, 2u);
    });
}

// ---- contents

void uninitialised_memory() {
  const std::string nothing = "nothing has written";
  expect_shared("shared, not written", {nothing}, {1, 32, 64, false},
                [] { load_shared(reinterpret_cast<uint32_t*>(shared_memory())); });
  // Shared memory holds nothing again when the next block starts.
  expect_shared("shared, of the block before", {nothing}, {2, 32, 64, false}, [] {
    auto* word = reinterpret_cast<uint32_t*>(shared_memory());
    if (thread_index() == 0 && block_index() == 0) store_shared(word, 1u);
    sync_warp();
    load_shared(word);
  });
  expect_shared("half of a word", {nothing}, {1, 32, 64, false}, [] {
    if (thread_index() == 0) store_shared(reinterpret_cast<uint16_t*>(shared_memory()), uint16_t{1});
    sync_warp();
    load_shared(reinterpret_cast<uint32_t*>(shared_memory()));
  });
  expect_shared("ldmatrix, one row of 32", {nothing}, {1, 32, 512, false}, [] {
    auto* row = reinterpret_cast<Float4*>(shared_memory()) + thread_index();
    if (thread_index() != 17) store_shared(row, Float4{});
    sync_warp();
    uint32_t r[4];
    load_matrix_transposed(r, row);
  });
  for (const bool written : {true, false})
    expect("global", {written ? "" : nothing}, [&](uint64_t seed) {
      std::vector<float> data(64);
      Memory memory;
      memory.add("data", data.data(), data.size() * 4, false);
      CHECK(std::isnan(data[0]) && std::isnan(data[63]), "not poisoned");
      // One launch writes, the next reads.
      const std::string first = outcome(
          memory, {2, 32, 0, false},
          [&] {
            const int i = block_index() * 32 + thread_index();
            if (written || i != 45) store_global(&data[i], 1.0f);
          },
          seed);
      CHECK(first.empty(), "%s", first.c_str());
      return outcome(memory, {1, 64, 0, false}, [&] { load_global(&data[63 - thread_index()]); }, seed);
    });
}

void constants() {
  const auto run = [](bool load_first, bool same_launch, bool ordinary_load, uint64_t seed) {
    std::vector<float> data(32);
    Memory memory;
    memory.add("data", data.data(), data.size() * 4, true);
    const auto store = [&] { store_global(&data[thread_index()], 1.0f); };
    const auto load = [&] {
      const float* p = &data[31 - thread_index()];
      ordinary_load ? load_global(p) : load_constant(p);
    };
    const Shape shape{1, 32, 0, false};
    if (!same_launch) {
      const std::string first = outcome(memory, shape, store, seed);
      return first.empty() ? outcome(memory, shape, load, seed) : first;
    }
    return outcome(
        memory, shape,
        [&] {
          load_first ? load() : store();
          sync_block();
          load_first ? store() : load();
        },
        seed);
  };
  expect("constant of an earlier launch", {""}, [&](uint64_t seed) { return run(false, false, false, seed); });
  expect("no constant, stored before", {""}, [&](uint64_t seed) { return run(false, true, true, seed); });
  expect("no constant, stored after", {""}, [&](uint64_t seed) { return run(true, true, true, seed); });
  expect("constant, stored before", {"load_constant"}, [&](uint64_t seed) { return run(false, true, false, seed); });
  expect("constant, stored after", {"load_constant"}, [&](uint64_t seed) { return run(true, true, false, seed); });
  expect("store to constant memory", {"which is constant"}, [](uint64_t seed) {
    float data[32] = {};
    Memory memory;
    memory.add("data", static_cast<const void*>(data), sizeof(data));
    return outcome(memory, {1, 32, 0, false}, [&] { store_global(&data[thread_index()], 1.0f); }, seed);
  });
}

struct alignas(16) Settings {
  int values[12];
};

// A struct in shared memory that one thread brings and all read, again and again.
void views() {
  for (const int bug : {0, 1, 2})
    expect_shared("view",
                  bug == 0 ? std::vector<std::string>{""} : std::vector<std::string>{"race", "nothing has written"},
                  {1, 64, sizeof(Settings), false}, [&] {
                    auto* settings = reinterpret_cast<Settings*>(shared_memory());
                    for (int round = 0; round < 3; ++round) {
                      if (thread_index() < 3)
                        store_shared(reinterpret_cast<Float4*>(settings) + thread_index(), Float4{});
                      if (bug != 1) sync_block();
                      CHECK(bug || view_shared(settings).values[11] == 0, "view");
                      if (bug) view_shared(settings);
                      if (bug != 2) sync_block();
                    }
                  });
}

// Threads may share a word, each with bytes of its own.
void parts_of_words() {
  for (const int bug : {0, 1, 2, 3})
    expect_shared("bytes", {bug ? "race" : ""}, {1, 64, 64, false}, [&] {
      char* bytes = shared_memory();
      const int me = thread_index();
      store_shared(reinterpret_cast<uint8_t*>(bytes) + me, static_cast<uint8_t>(me));
      if (bug == 1 && me == 9) store_shared(reinterpret_cast<uint32_t*>(bytes) + 3, 0u);
      if (bug == 2 && me == 9) store_shared(reinterpret_cast<uint16_t*>(bytes) + 5, uint16_t{0});
      sync_block();
      if (me < 16) {
        const uint32_t word = load_shared(reinterpret_cast<uint32_t*>(bytes) + me);
        CHECK(bug || word == 0x03020100u + 0x04040404u * static_cast<uint32_t>(me), "%x", word);
      }
      if (bug != 3) sync_block();
      if (me < 4) store_shared(reinterpret_cast<Float4*>(bytes) + me, Float4{});
      sync_block();
      if (me < 32) store_shared(reinterpret_cast<uint16_t*>(bytes) + me, uint16_t{1});
    });
}

// ---- asynchronous copies

enum class CopyBug { kNone, kNoWait, kNoCommit, kWaitsForOneTooFew, kOtherThreadsData, kSourceWritten, kOverwritten };

// Two stages: while a chunk is used, the next is on its way.
void pipeline(const float* source, float* scratch, float* sums, int chunks, CopyBug bug) {
  const int me = thread_index(), threads = block_threads();
  char* shared = shared_memory();
  const auto fetch = [&](int chunk) {
    if (chunk < chunks) copy_async_16(shared + (chunk % 2 * threads + me) * 16, source + (chunk * threads + me) * 4);
    if (bug != CopyBug::kNoCommit) copy_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    fetch(chunk + 1);
    if (bug == CopyBug::kSourceWritten && chunk == 1) store_global(scratch + (2 * threads + me) * 4, 1.0f);
    if (bug == CopyBug::kOverwritten && chunk == 1)
      store_shared(reinterpret_cast<float*>(shared + (2 % 2 * threads + me) * 16), 1.0f);
    if (bug == CopyBug::kWaitsForOneTooFew)
      copy_async_wait<2>();
    else if (bug != CopyBug::kNoWait)
      copy_async_wait<1>();
    if (bug != CopyBug::kOtherThreadsData) sync_block();
    const int other = (me + 1) % threads;
    sum += load_shared(reinterpret_cast<Float4*>(shared + (chunk % 2 * threads + other) * 16)).z;
    sync_block();
  }
  copy_async_wait<0>();
  store_global(sums + me, sum);
}

void asynchronous_copies() {
  const int threads = 64, chunks = 5;
  const auto run = [&](CopyBug bug, uint64_t seed) {
    std::vector<float> source(static_cast<size_t>(threads * chunks * 4)), sums(threads);
    for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<float>(i);
    Memory memory;
    memory.add("source", source.data(), source.size() * 4, true);
    memory.add("sums", sums.data(), sums.size() * 4, false);
    const std::string message = outcome(
        memory, {1, threads, static_cast<size_t>(2 * threads * 16), false},
        [&] { pipeline(source.data(), source.data(), sums.data(), chunks, bug); }, seed);
    if (message.empty())
      for (int t = 0; t < threads; ++t) {
        float sum = 0;
        for (int c = 0; c < chunks; ++c) sum += static_cast<float>((c * threads + (t + 1) % threads) * 4 + 2);
        CHECK(sums[t] == sum, "%g instead of %g", sums[t], sum);
      }
    return message;
  };
  const std::string on_its_way = "on its way";
  const std::vector<std::pair<CopyBug, std::vector<std::string>>> cases = {
      {CopyBug::kNone, {""}},
      {CopyBug::kNoWait, {on_its_way}},
      {CopyBug::kNoCommit, {on_its_way}},
      {CopyBug::kWaitsForOneTooFew, {on_its_way}},
      {CopyBug::kOtherThreadsData, {on_its_way, "race", "nothing has written"}},
      {CopyBug::kSourceWritten, {"source has been written"}},
      {CopyBug::kOverwritten, {on_its_way}},
  };
  for (const auto& [bug, phrases] : cases)
    expect(("copies, bug " + std::to_string(static_cast<int>(bug))).c_str(), phrases,
           [&, b = bug](uint64_t seed) { return run(b, seed); });
  expect("a copy that nobody waits for", {"ends with an asynchronous copy"}, [](uint64_t seed) {
    alignas(16) float source[4] = {};
    Memory memory;
    memory.add("source", static_cast<const void*>(source), sizeof(source));
    return outcome(
        memory, {1, 32, 512, false},
        [&] {
          copy_async_16(shared_memory() + 16 * thread_index(), source);
          copy_async_commit();
        },
        seed);
  });
}

// ---- races, by definition

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

// ---- arithmetic

double value_of_half(int bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
double value_of_bfloat16(int bits) {
  const int exponent = bits >> 7 & 255, mantissa = bits & 127;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class S>
void rounding(double (*value_of)(int), int infinity) {
  const char* name = std::is_same_v<S, Half> ? "half" : "bfloat16";
  for (int bits = 0; bits < infinity; ++bits)
    for (const int sign : {0, 0x8000}) {
      const double value = value_of(bits | sign);
      float low, high;
      unpack2<S>(static_cast<uint32_t>(bits | sign) << 16 | 0x1u, low, high);
      CHECK(high == value, "%s %x is %g, not %g", name, bits | sign, high, value);
      CHECK(to_bits<S>(static_cast<float>(value)) == (bits | sign), "%s %x does not come back", name, bits | sign);
      // Between this value and the next: nearer one, or the even one; beyond the largest as if one more followed.
      const double next = bits + 1 == infinity ? 2 * value_of(bits) - value_of(bits - 1) : value_of(bits + 1);
      const double step = next - value_of(bits), sign_factor = sign ? -1.0 : 1.0;
      for (const double part : {0.25, 0.5 - 1.0 / 4096, 0.5, 0.5 + 1.0 / 4096, 0.75}) {
        const double between = sign_factor * (value_of(bits) + part * step);
        const float argument = static_cast<float>(between);
        if (static_cast<double>(argument) != between) continue;  // bfloat16's subnormals: floats are as coarse
        const int up = part > 0.5 || (part == 0.5 && bits % 2 == 1);
        CHECK(to_bits<S>(argument) == ((bits + up) | sign), "%s of %a is %x, not %x", name, argument,
              to_bits<S>(argument), (bits + up) | sign);
      }
    }
  const float huge = INFINITY;
  float low, high;
  unpack2<S>(pack2<S>(huge, -huge), low, high);
  CHECK(low == huge && high == -huge, "%s: infinity becomes %g, %g", name, low, high);
  unpack2<S>(pack2<S>(NAN, 1.0f), low, high);
  CHECK(std::isnan(low) && high == 1.0f && to_bits<S>(NAN) == 0x7fff, "%s: NaN", name);
  CHECK(pack2<S>(1.0f, -2.0f) == (to_bits<S>(1.0f) | static_cast<uint32_t>(to_bits<S>(-2.0f)) << 16), "%s", name);
  CHECK(to_bits<S>(-0.0f) == 0x8000, "%s: minus zero", name);
}

// One mma on random matrices, filled and read by the formulas of the PTX ISA (section "Matrix Fragments for
// mma.m16n8k16 with floating point type").
template <class S>
void matrix_product() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto rounded = [&](float value) {
    float low, high;
    unpack2<S>(pack2<S>(value, 0), low, high);
    return low;
  };
  float a[16][16], b[16][8], c[16][8], d[16][8];
  for (auto& row : a)
    for (float& value : row) value = rounded(normal(random));
  for (auto& row : b)
    for (float& value : row) value = rounded(normal(random));
  for (auto& row : c)
    for (float& value : row) value = normal(random);
  Memory memory;
  const std::string message = outcome(
      memory, {1, 64, 0, false},
      [&] {
        const int lane = thread_index() % 32, group = lane / 4, in_group = lane % 4;
        uint32_t a_registers[4], b_registers[2];
        for (int i = 0; i < 8; i += 2) {
          const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = in_group * 2 + (i >= 4 ? 8 : 0);
          a_registers[i / 2] = pack2<S>(a[row][column], a[row][column + 1]);
        }
        for (int i = 0; i < 4; i += 2) {
          const int row = in_group * 2 + (i >= 2 ? 8 : 0);
          b_registers[i / 2] = pack2<S>(b[row][group], b[row + 1][group]);
        }
        float sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = c[i < 2 ? group : group + 8][in_group * 2 + i % 2];
        multiply_accumulate<S>(sums, Vec4{a_registers[0], a_registers[1], a_registers[2], a_registers[3]},
                               b_registers[0], b_registers[1]);
        for (int i = 0; i < 4; ++i) d[i < 2 ? group : group + 8][in_group * 2 + i % 2] = sums[i];
      },
      0);
  CHECK(message.empty(), "%s", message.c_str());
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double exact = c[m][n];
      float in_order = c[m][n];
      for (int k = 0; k < 16; ++k) {
        exact += static_cast<double>(a[m][k]) * b[k][n];
        in_order += a[m][k] * b[k][n];
      }
      CHECK(d[m][n] == in_order && std::abs(d[m][n] - exact) < 2e-5, "d[%d][%d] is %g, not %g", m, n, d[m][n], exact);
    }
}

void matrix_moves() {
  Memory memory;
  const std::string message = outcome(
      memory, {1, 32, 512, false},
      [&] {
        const int lane = thread_index();
        const auto element = [](int matrix, int row, int column) {
          return static_cast<uint32_t>(matrix * 64 + row * 8 + column + 1);
        };
        // Lane l holds a row of matrix l / 8.
        for (int column = 0; column < 8; ++column)
          store_shared(reinterpret_cast<uint16_t*>(shared_memory()) + lane * 8 + column,
                       static_cast<uint16_t>(element(lane / 8, lane % 8, column)));
        sync_warp();
        uint32_t r[4];
        load_matrix_transposed(r, shared_memory() + lane * 16);
        // Without .trans lane l would get elements 2 (l % 4) and the next of row l / 4; so rows become columns.
        for (int matrix = 0; matrix < 4; ++matrix) {
          const uint32_t expected =
              element(matrix, lane % 4 * 2, lane / 4) | element(matrix, lane % 4 * 2 + 1, lane / 4) << 16;
          CHECK(r[matrix] == expected, "lane %d matrix %d: %x, not %x", lane, matrix, r[matrix], expected);
        }
        const uint32_t row = element(0, lane / 4, lane % 4 * 2) | element(0, lane / 4, lane % 4 * 2 + 1) << 16;
        CHECK(transpose_8x8(row) == r[0], "lane %d: movmatrix", lane);
        CHECK(transpose_8x8(transpose_8x8(row)) == row, "lane %d: twice", lane);
        for (const int mask : {1, 2, 4, 8, 16, 31})
          CHECK(shuffle_xor(static_cast<float>(lane), mask) == static_cast<float>(lane ^ mask), "shuffle %d", mask);
        for (const int from : {0, 1, 17, 31}) CHECK(shuffle_from(-lane, from) == -from, "shuffle from %d", from);
      },
      0);
  CHECK(message.empty(), "%s", message.c_str());
  int sum = 0;
  static_for<5>([&](auto i) {
    constexpr int value = decltype(i)::value;
    static_assert(value >= 0 && value < 5);
    sum = sum * 10 + value;
  });
  CHECK(sum == 1234, "%d", sum);
  CHECK(fused_multiply_add(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f) == 0x1p-11f + 0x1p-24f, "fma");
  CHECK(exponential(0.0f) == 1.0f && hyperbolic_tangent(0.0f) == 0.0f && square_root(9.0f) == 3.0f, "functions");
}

// ---- the executor itself

void orders() {
  const auto trace = [](uint64_t seed) {
    std::vector<int> order;
    Memory memory;
    outcome(
        memory, {3, 64, 0, false},
        [&] {
          for (int i = 0; i < 2; ++i) {
            order.push_back(block_index() * 64 + thread_index());
            sync_block();
          }
        },
        seed);
    CHECK(order.size() == 2 * 3 * 64, "%zu", order.size());
    return order;
  };
  std::vector<int> straight;
  for (int block = 0; block < 3; ++block)
    for (int round = 0; round < 2; ++round)
      for (int thread = 0; thread < 64; ++thread) straight.push_back(block * 64 + thread);
  // Whoever arrives last goes on first.
  std::vector<int> first = trace(0);
  for (int block = 0; block < 3; ++block)
    std::sort(first.begin() + block * 128 + 64, first.begin() + block * 128 + 128);
  CHECK(first == straight, "without a seed the order is plain");
  CHECK(trace(1) == trace(1), "one seed, one order");
  CHECK(trace(1) != trace(2) && trace(1) != straight, "other seeds, other orders");
  CHECK(trace(1)[0] / 64 != trace(2)[0] / 64 || trace(1)[0] / 64 != trace(3)[0] / 64 ||
            trace(1)[0] / 64 != trace(4)[0] / 64,
        "blocks change places");
}

template <class Error>
void throws(const char* part, const std::function<void()>& call) {
  try {
    call();
    CHECK(false, "nothing thrown, expected '%s'", part);
  } catch (const Error& error) {
    CHECK(std::string(error.what()).find(part) != std::string::npos, "'%s' lacks '%s'", error.what(), part);
  }
}

void wrong_use() {
  Memory memory;
  float data[64] = {};
  memory.add("data", data, 128, true);
  throws<std::invalid_argument>("overlaps", [&] { memory.add("more", data + 31, 8, true); });
  throws<std::invalid_argument>("overlaps", [&] { memory.add("same", data, 8, true); });
  throws<std::invalid_argument>("overlaps", [&] { memory.add("inside", data + 1, 8, true); });
  throws<std::invalid_argument>("within one range", [&] { memory.mark_initialised(data + 30, 16); });
  throws<std::invalid_argument>("no range", [&] { memory.remove(data + 1); });
  memory.add("empty", data, 0, true);
  memory.add("empty, nowhere", nullptr, 0, true);
  memory.add("after", data + 32, 128, true);
  memory.remove(data);
  memory.add("again", data, 128, true);
  const auto nothing = [] {};
  throws<std::invalid_argument>("multiple of 32", [&] { execution::launch(memory, 1, 33, 0, false, nothing); });
  throws<std::invalid_argument>("blocks", [&] { execution::launch(memory, 0, 32, 0, false, nothing); });
  throws<std::invalid_argument>("resident", [&] { execution::launch(memory, 17, 1024, 0, true, nothing); });
  throws<std::logic_error>("cannot launch", [&] {
    execution::launch(memory, 1, 32, 0, false, [&] { execution::launch(memory, 1, 32, 0, false, nothing); });
  });
  throws<std::domain_error>("from a kernel", [&] {
    execution::launch(memory, 2, 32, 0, true, [&] {
      if (block_index() == 1 && thread_index() == 5) throw std::domain_error("from a kernel");
      sync_block();
    });
  });
  // Whatever went wrong before, the next launch runs.
  int ran = 0;
  execution::launch(memory, 2, 64, 0, true, [&] { ++ran; });
  CHECK(ran == 128, "%d threads ran", ran);
}

// A message names the thread, the byte, both lines and how far both had come.
void messages() {
  Memory memory;
  float data[8] = {};
  memory.add("weights", data, sizeof(data), true);
  const int line = __LINE__;
  const auto kernel = [&] {
    sync_block();
    if (thread_index() == 3) store_global(data + 2, 1.0f);   // line + 3
    if (thread_index() == 70) store_global(data + 2, 1.0f);  // line + 4
  };
  const std::string message = outcome(memory, {1, 96, 0, false}, kernel, 0);
  const std::string file = "test_execution.cpp:";
  for (const std::string& part :
       {std::string("race: "), std::string("thread 3 of block 0"), std::string("thread 70 of block 0"),
        std::string("byte 8 of 'weights'"), file + std::to_string(line + 3), file + std::to_string(line + 4),
        std::string("after 1 sync_block, 0 sync_warp")})
    CHECK(message.find(part) != std::string::npos, "'%s' lacks '%s'", message.c_str(), part.c_str());
  CHECK(message.find('\n') == std::string::npos, "one line");
}

}  // namespace

int main() {
  block_and_warp_barriers();
  readers_before_a_writer();
  team_barriers();
  order_through_others();
  partings();
  bounds_and_alignment();
  wrong_index();
  uninitialised_memory();
  constants();
  views();
  parts_of_words();
  asynchronous_copies();
  random_programs();
  rounding<Half>(value_of_half, 0x7c00);
  rounding<Bfloat16>(value_of_bfloat16, 0x7f80);
  matrix_product<Half>();
  matrix_product<Bfloat16>();
  matrix_moves();
  orders();
  wrong_use();
  messages();
  return report((std::string("execution, fibers by ") + execution::fiber_implementation()).c_str());
}
