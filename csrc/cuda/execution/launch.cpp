#include "launch.h"

#include <cstring>
#include <exception>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "fragments.h"
#include "primitives.h"

namespace defgan::cuda::execution {

namespace {

enum class Collective { kNone, kSyncWarp, kShuffle, kTranspose, kLoadMatrix, kMultiply };
enum class Wait { kNothing, kWarp, kBlock, kTeam, kEnded };

struct Block;

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block = nullptr;
  int index = 0;  // in the block
  Wait wait = Wait::kNothing;
  Site site{};
};

struct Warp {
  uint32_t ready = 0;    // lanes that can run
  uint32_t arrived = 0;  // lanes that wait at the collective below
  uint32_t ended = 0;
  Collective collective = Collective::kNone;
  Site site{};
  uint32_t in[32], out[32];
  const void* rows[32];
  uint32_t* results[32];
  MatrixOperands operands;
};

struct Block {
  int index = 0;
  int first_thread = 0;  // among the resident threads
  int arrived = 0;
  char* shared = nullptr;
};

struct Team {
  int blocks = 0;
  int arrived = 0;  // threads
  std::vector<Block*> members;
};

class Executor {
 public:
  void run(int blocks, int threads, size_t shared_bytes, bool cooperative, const std::function<void()>& kernel,
           const Options& options);

  void wait_for_warp(Collective collective, Site site);
  void wait_for_block(Site site);
  void wait_for_team(TeamBarrier* barrier, int blocks, Site site);

  Thread& self() { return threads_[current_]; }
  Warp& warp() { return warps_[current_ / kWarpThreads]; }
  int lane() const { return current_ % kWarpThreads; }
  int block_count() const { return block_count_; }
  int block_threads() const { return block_threads_; }

  [[noreturn]] void fail(const std::string& message);

 private:
  static void enter();
  void run_resident();
  void suspend();
  void resume_block(const Block& block);
  int pick();

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::map<TeamBarrier*, Team> teams_;
  Fiber main_;
  int current_ = 0;
  int live_ = 0;
  int block_count_ = 0, block_threads_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::mt19937_64 random_;
  bool shuffled_ = false;
  std::string error_;
  std::exception_ptr exception_;
};

Executor* executor = nullptr;

void Executor::fail(const std::string& message) {
  error_ = message;
  Fiber::switch_to(*self().fiber, main_);
  std::terminate();
}

int Executor::pick() {
  const int here = current_ / kWarpThreads, count = static_cast<int>(warps_.size());
  const auto lane_of = [&](uint32_t ready) {
    if (shuffled_)
      for (int skip = static_cast<int>(random_() % static_cast<unsigned>(__builtin_popcount(ready))); skip > 0; --skip)
        ready &= ready - 1;
    return __builtin_ctz(ready);
  };
  const bool stay = !shuffled_ || random_() % 8 != 0;
  if (stay && warps_[here].ready != 0) return here * kWarpThreads + lane_of(warps_[here].ready);
  const int start = shuffled_ ? static_cast<int>(random_() % static_cast<unsigned>(count)) : here;
  for (int i = 0; i < count; ++i) {
    const int w = (start + i) % count;
    if (warps_[w].ready != 0) return w * kWarpThreads + lane_of(warps_[w].ready);
  }
  return -1;
}

// Lets another thread run; returns when this one is chosen again.
void Executor::suspend() {
  const int me = current_, next = pick();
  if (next < 0) fail("deadlock: every thread waits");
  if (next == me) return;
  current_ = next;
  Fiber::switch_to(*threads_[me].fiber, *threads_[next].fiber);
}

void Executor::enter() {
  Fiber::entered();
  try {
    (*executor->kernel_)();
  } catch (...) {
    executor->exception_ = std::current_exception();
    executor->fail("the kernel threw an exception");
  }
  Thread& self = executor->self();
  self.wait = Wait::kEnded;
  executor->warp().ready &= ~(1u << executor->lane());
  executor->warp().ended |= 1u << executor->lane();
  if (--executor->live_ == 0) Fiber::switch_to(*self.fiber, executor->main_);
  executor->suspend();
  std::terminate();
}

void Executor::run_resident() {
  live_ = static_cast<int>(threads_.size());
  for (Warp& warp : warps_) {
    warp.ready = ~0u;
    warp.arrived = warp.ended = 0;
  }
  for (Thread& thread : threads_) {
    thread.wait = Wait::kNothing;
    thread.fiber->prepare(&Executor::enter);
  }
  current_ = 0;
  current_ = pick();
  Fiber::switch_to(main_, *self().fiber);
  if (exception_) std::rethrow_exception(exception_);
  if (!error_.empty()) throw Failure(error_);
}

void Executor::run(int blocks, int threads, size_t shared_bytes, bool cooperative, const std::function<void()>& kernel,
                   const Options& options) {
  if (blocks < 1 || threads < 1 || threads % kWarpThreads != 0 || threads > 1024)
    throw std::invalid_argument("a launch needs blocks and whole warps, up to 1024 threads each");
  const int resident = cooperative ? blocks : 1;
  kernel_ = &kernel;
  block_count_ = blocks;
  block_threads_ = threads;
  shuffled_ = options.seed != 0;
  random_.seed(options.seed);
  const size_t stride = (shared_bytes + 255) / 128 * 128;
  std::vector<char> storage(stride * static_cast<size_t>(resident) + 128);
  char* shared = storage.data() + (128 - reinterpret_cast<uintptr_t>(storage.data()) % 128) % 128;
  blocks_.resize(static_cast<size_t>(resident));
  warps_.resize(static_cast<size_t>(resident * threads / kWarpThreads));
  threads_.resize(static_cast<size_t>(resident * threads));
  for (int b = 0; b < resident; ++b) {
    blocks_[b].first_thread = b * threads;
    blocks_[b].shared = shared + stride * static_cast<size_t>(b);
    for (int t = 0; t < threads; ++t) {
      Thread& thread = threads_[b * threads + t];
      thread.block = &blocks_[b];
      thread.index = t;
      thread.fiber = std::make_unique<Fiber>(options.stack_bytes);
    }
  }
  for (int first = 0; first < blocks; first += resident) {
    for (int b = 0; b < resident; ++b) blocks_[b].index = first + b;
    std::memset(shared, 0xff, stride * static_cast<size_t>(resident));
    run_resident();
  }
}

void Executor::wait_for_warp(Collective collective, Site site) {
  Warp& warp = this->warp();
  const uint32_t bit = 1u << lane();
  if (warp.ended != 0) fail("lanes of this warp have ended");
  if (warp.arrived != 0 && (warp.collective != collective || warp.site.line != site.line))
    fail("lanes of one warp meet at different collectives");
  warp.collective = collective;
  warp.site = site;
  warp.arrived |= bit;
  if (warp.arrived == ~0u) {
    switch (collective) {
      case Collective::kMultiply: break;
      case Collective::kLoadMatrix: load_matrix_fragments(warp.rows, warp.results); break;
      case Collective::kTranspose: transpose_fragments(warp.in, warp.out); break;
      case Collective::kShuffle: std::memcpy(warp.out, warp.in, sizeof(warp.out)); break;
      default: break;
    }
    warp.arrived = 0;
    warp.ready = ~0u;
    return;
  }
  self().wait = Wait::kWarp;
  self().site = site;
  warp.ready &= ~bit;
  suspend();
  self().wait = Wait::kNothing;
}

void Executor::resume_block(const Block& block) {
  for (int w = 0; w < block_threads_ / kWarpThreads; ++w) warps_[block.first_thread / kWarpThreads + w].ready = ~0u;
}

void Executor::wait_for_block(Site site) {
  Block& block = *self().block;
  if (++block.arrived == block_threads_) {
    block.arrived = 0;
    resume_block(block);
    return;
  }
  self().wait = Wait::kBlock;
  self().site = site;
  warp().ready &= ~(1u << lane());
  suspend();
  self().wait = Wait::kNothing;
}

void Executor::wait_for_team(TeamBarrier* barrier, int blocks, Site site) {
  Team& team = teams_[barrier];
  if (self().index == 0) team.members.push_back(self().block);
  if (++team.arrived == blocks * block_threads_) {
    barrier->arrivals += static_cast<uint32_t>(blocks);
    for (const Block* block : team.members) resume_block(*block);
    teams_.erase(barrier);
    return;
  }
  self().wait = Wait::kTeam;
  self().site = site;
  warp().ready &= ~(1u << lane());
  suspend();
  self().wait = Wait::kNothing;
}

}  // namespace

struct Memory::State {};
Memory::Memory() : state_(new State) {}
Memory::~Memory() = default;
void Memory::add(const std::string&, void* data, size_t bytes, bool initialised) {
  if (!initialised) std::memset(data, 0xff, bytes);
}
void Memory::add(const std::string&, const void*, size_t) {}
void Memory::mark_initialised(const void*, size_t) {}
void Memory::remove(const void*) {}

void launch(Memory&, int blocks, int threads, size_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel, const Options& options) {
  if (executor != nullptr) throw std::logic_error("launches do not nest");
  Executor one;
  executor = &one;
  try {
    one.run(blocks, threads, shared_bytes, cooperative, kernel, options);
  } catch (...) {
    executor = nullptr;
    throw;
  }
  executor = nullptr;
}

int thread_index() { return executor->self().index; }
int block_index() { return executor->self().block->index; }
int block_count() { return executor->block_count(); }
int block_threads() { return executor->block_threads(); }
char* shared_memory() { return executor->self().block->shared; }

void check_access(Access, const void*, size_t, Site) {}

void copy_async_16(void* shared, const void* global, Site) { std::memcpy(shared, global, 16); }
void copy_async_commit() {}
void copy_async_wait(int, Site) {}

void sync_warp(Site site) { executor->wait_for_warp(Collective::kSyncWarp, site); }
void sync_block(Site site) { executor->wait_for_block(site); }
void sync_team(TeamBarrier* barrier, int blocks, Site site) { executor->wait_for_team(barrier, blocks, site); }

uint32_t shuffle_xor(uint32_t value, int mask, Site site) {
  Warp& warp = executor->warp();
  const int lane = executor->lane();
  warp.in[lane] = value;
  executor->wait_for_warp(Collective::kShuffle, site);
  return warp.out[lane ^ mask];
}

uint32_t transpose_8x8(uint32_t row, Site site) {
  Warp& warp = executor->warp();
  const int lane = executor->lane();
  warp.in[lane] = row;
  executor->wait_for_warp(Collective::kTranspose, site);
  return warp.out[lane];
}

void load_matrix_transposed(uint32_t (&r)[4], const void* shared_row, Site site) {
  Warp& warp = executor->warp();
  const int lane = executor->lane();
  warp.rows[lane] = shared_row;
  warp.results[lane] = r;
  executor->wait_for_warp(Collective::kLoadMatrix, site);
}

void multiply_accumulate(Format format, float (&c)[4], const Vec4& a, uint32_t b0, uint32_t b1, Site site) {
  Warp& warp = executor->warp();
  const int lane = executor->lane();
  std::memcpy(warp.operands.a[lane], &a, 16);
  const uint32_t b[2] = {b0, b1};
  std::memcpy(warp.operands.b[lane], b, 8);
  warp.operands.c[lane] = c;
  const bool last = (warp.arrived | 1u << lane) == ~0u;
  if (last) multiply_accumulate_fragments(format, warp.operands);
  executor->wait_for_warp(Collective::kMultiply, site);
}

uint16_t round_to(Format format, float value) {
  return format == Format::kHalf ? round_to_half(value) : round_to_bfloat16(value);
}
float value_of(Format format, uint16_t bits) {
  return format == Format::kHalf ? value_of_half(bits) : value_of_bfloat16(bits);
}

}  // namespace defgan::cuda::execution
