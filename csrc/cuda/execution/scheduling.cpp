// Starts the threads of a launch and decides which of them runs next.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "executor.h"

namespace defgan::cuda::execution {

namespace {

// Kernels keep what they would keep in registers, at most 1 KB, but unoptimised code has a slot for every temporary.
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxBlockThreads = 1024;
// Every stack takes two entries of the kernel's table of mappings, which has 65,530 by default.
constexpr int kMaxResidentThreads = 16 * 1024;

// Stacks are kept for the next launch: mapping and unmapping hundreds of them takes longer than a small kernel.
std::vector<std::unique_ptr<Fiber>>& spare_fibers() {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  return fibers;
}

}  // namespace

Executor::Executor(Memory::Ranges& memory, int blocks, int threads, size_t shared_bytes, bool cooperative,
                   const std::function<void()>& kernel, const Options& options)
    : memory_(memory),
      kernel_(kernel),
      block_count_(blocks),
      block_threads_(threads),
      resident_(cooperative ? blocks : 1),
      shared_bytes_(shared_bytes),
      cooperative_(cooperative),
      shuffled_(options.seed != 0) {
  if (blocks < 1 || blocks > static_cast<int>(ThreadSet::kMaxBlocks))
    throw std::invalid_argument("a launch has 1 to 1048576 blocks, got " + std::to_string(blocks));
  if (threads < 1 || threads % kWarpThreads != 0 || threads > kMaxBlockThreads)
    throw std::invalid_argument("a block has a multiple of 32 threads, up to 1024, got " + std::to_string(threads));
  if (resident_ > kMaxResidentThreads / threads)
    throw std::invalid_argument("at most 16384 threads can be resident on the CPU, got " + std::to_string(blocks) +
                                " blocks of " + std::to_string(threads));
  random_.seed(options.seed);
  // Blocks' shared memories are apart, so that running over the end of one does not look like an access to the next.
  const size_t stride = (shared_bytes + 127) / 128 * 128 + 128;
  shared_storage_.resize(stride * static_cast<size_t>(resident_) + 128);
  char* shared = shared_storage_.data();
  shared += (128 - reinterpret_cast<uintptr_t>(shared) % 128) % 128;
  const int warps_per_block = threads / kWarpThreads;
  blocks_.resize(static_cast<size_t>(resident_));
  warps_.resize(static_cast<size_t>(resident_ * warps_per_block));
  threads_.resize(static_cast<size_t>(resident_ * threads));
  for (int b = 0; b < resident_; ++b) {
    Block& block = blocks_[b];
    block.slot = b;
    block.warps = &warps_[b * warps_per_block];
    block.shared = shared + stride * static_cast<size_t>(b);
    block.shadow = std::make_unique<Shadow>(reinterpret_cast<uintptr_t>(block.shared), shared_bytes);
    block.met_with.assign(static_cast<size_t>(resident_), 0);
    for (int t = 0; t < threads; ++t) {
      Thread& thread = threads_[b * threads + t];
      thread.block = &block;
      thread.warp = &block.warps[t / kWarpThreads];
      thread.index = t;
      thread.lane = t % kWarpThreads;
      if (spare_fibers().empty()) {
        thread.fiber = std::make_unique<Fiber>(kStackBytes);
      } else {
        thread.fiber = std::move(spare_fibers().back());
        spare_fibers().pop_back();
      }
    }
  }
}

Executor::~Executor() {
  for (Thread& thread : threads_)
    if (thread.fiber) spare_fibers().push_back(std::move(thread.fiber));
}

void Executor::run() {
  started_ = advance();
  const int rounds = block_count_ / resident_;
  std::vector<int> order(static_cast<size_t>(rounds));
  for (int i = 0; i < rounds; ++i) order[i] = i;
  if (shuffled_)
    for (int i = rounds - 1; i > 0; --i) std::swap(order[i], order[random_.below(static_cast<uint32_t>(i) + 1)]);
  for (const int round : order) run_resident(round * resident_);
}

void Executor::run_resident(int first_block) {
  const Time start = advance();
  for (Block& block : blocks_) {
    block.index = first_block + block.slot;
    block.arrived = block.ended = 0;
    block.started = block.met = start;
    block.meetings.clear();
    block.team_meetings.clear();
    std::fill(block.met_with.begin(), block.met_with.end(), started_);
    std::memset(block.shared, 0xff, shared_bytes_);
  }
  for (Warp& warp : warps_) {
    warp.ready = kAllLanes;
    warp.arrived = warp.ended = 0;
    warp.met = start;
    warp.meetings.clear();
  }
  for (Thread& thread : threads_) {
    thread.who = ThreadSet::make(ThreadSet::kThread, static_cast<uint32_t>(thread.block->index),
                                 static_cast<uint32_t>(thread.index));
    thread.waits_for = Meeting::kNone;
    thread.copies.clear();
    thread.committed_batches = 0;
    thread.fiber->prepare(&Executor::enter);
  }
  live_ = static_cast<int>(threads_.size());
  self_ = &threads_[0];
  self_ = &threads_[pick()];
  Fiber::switch_to(main_, *self_->fiber);
  if (exception_) std::rethrow_exception(exception_);
}

// A thread of the same warp where there is one: its stack and its warp's data are in the cache.
int Executor::pick() {
  const auto lane_of = [&](uint32_t ready) {
    if (!shuffled_) return __builtin_ctz(ready);
    const uint32_t first = random_.below(kWarpThreads);
    const uint32_t from_first = ready >> first << first;
    return __builtin_ctz(from_first != 0 ? from_first : ready);
  };
  const int here = static_cast<int>(self_->warp - warps_.data()), count = static_cast<int>(warps_.size());
  const bool stay = !shuffled_ || random_.below(16) != 0;
  if (stay && warps_[here].ready != 0) return here * kWarpThreads + lane_of(warps_[here].ready);
  const int start = shuffled_ ? static_cast<int>(random_.below(static_cast<uint32_t>(count))) : here;
  for (int i = 0; i < count; ++i) {
    const int w = start + i < count ? start + i : start + i - count;
    if (warps_[w].ready != 0) return w * kWarpThreads + lane_of(warps_[w].ready);
  }
  return -1;
}

// Lets other threads run until this one is made ready and chosen again.
void Executor::suspend(Meeting meeting, Site site) {
  Thread* me = self_;
  me->waits_for = meeting;
  me->site = site;
  me->warp->ready &= ~(1u << me->lane);
  const int next = pick();
  if (next < 0) fail("deadlock: nobody can go on; " + waiting_threads());
  self_ = &threads_[next];
  Fiber::switch_to(*me->fiber, *self_->fiber);
  me->waits_for = Meeting::kNone;
}

void Executor::enter() {
  Fiber::entered();
  try {
    executor->kernel_();
    executor->end_thread();
  } catch (...) {
    executor->exception_ = std::current_exception();
  }
  Fiber::switch_to(*executor->self().fiber, executor->main_);
  std::terminate();
}

void Executor::end_thread() {
  Thread& me = *self_;
  Warp& warp = *me.warp;
  Block& block = *me.block;
  if (!me.copies.empty())
    fail(describe(me) + " ends with an asynchronous copy still on its way (" + text_of(me.copies[0].site) + ")");
  if (warp.arrived != 0)
    fail(describe(me) + " ends while lanes of its warp wait in " + name_of(warp.meeting) + " at " + text_of(warp.site));
  if (block.arrived != 0)
    fail(describe(me) + " ends while threads of its block wait in sync_block at " + text_of(block.site));
  warp.ended |= 1u << me.lane;
  ++block.ended;
  if (--live_ > 0) suspend(Meeting::kEnd, Site{"", 0});
}

void launch(Memory& memory, int blocks, int threads, size_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel, const Options& options) {
  static std::recursive_mutex one_at_a_time;
  const std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
  if (executor != nullptr) throw std::logic_error("a kernel cannot launch another");
  Executor current(memory.ranges(), blocks, threads, shared_bytes, cooperative, kernel, options);
  struct Guard {
    explicit Guard(Executor* current) { executor = current; }
    ~Guard() { executor = nullptr; }
  } guard(&current);
  current.run();
}

}  // namespace defgan::cuda::execution
