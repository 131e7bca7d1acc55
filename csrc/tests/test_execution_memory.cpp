// Memory in the CPU execution of kernels: bounds, alignment, contents that nothing has written, constants, parts of
// words, asynchronous copies. Every rule of docs/gpu.md has a kernel that keeps it and twins with one planted mistake
// each.
#include <cmath>

#include "execution.h"

namespace {

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

}  // namespace

int main() {
  bounds_and_alignment();
  wrong_index();
  uninitialised_memory();
  constants();
  views();
  parts_of_words();
  asynchronous_copies();
  return report_execution("execution, memory");
}
