// Schedules the threads of a launch, lets warps, blocks and teams meet, and checks every access against the shadow
// memory. A thread runs until it has to wait for others: at barriers and at warp collectives, never in between. So
// what decides over a race is not the order that happened but whether a barrier forbids the other one.
#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "fragments.h"
#include "launch.h"
#include "primitives.h"
#include "shadow.h"

namespace defgan::cuda::execution {

namespace {

// Kernels keep what they would keep in registers, at most 1 KB, but unoptimised code has a slot for every temporary.
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxBlockThreads = 1024;
// Every stack takes two entries of the kernel's table of mappings, which has 65,530 by default.
constexpr int kMaxResidentThreads = 16 * 1024;
constexpr uint32_t kAllLanes = ~0u;

enum class Meeting {
  kNone,
  kSyncWarp,
  kShuffle,
  kShuffleFrom,
  kTranspose,
  kLoadMatrix,
  kMultiply,
  kSyncBlock,
  kSyncTeam,
  kEnd
};

const char* name_of(Meeting meeting) {
  switch (meeting) {
    case Meeting::kNone: return "nothing";
    case Meeting::kSyncWarp: return "sync_warp";
    case Meeting::kShuffle: return "shuffle_xor";
    case Meeting::kShuffleFrom: return "shuffle_from";
    case Meeting::kTranspose: return "transpose_8x8";
    case Meeting::kLoadMatrix: return "load_matrix_transposed";
    case Meeting::kMultiply: return "multiply_accumulate";
    case Meeting::kSyncBlock: return "sync_block";
    case Meeting::kSyncTeam: return "sync_team";
    case Meeting::kEnd: return "the kernel's end";
  }
  return "?";
}

bool operator==(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

std::string text_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

// Sites as numbers, small enough for the shadow memory.
class SiteTable {
 public:
  uint32_t number_of(Site site) {
    if (site.file != recent_) {
      size_t i = 0;
      while (i < files_.size() && files_[i] != site.file) ++i;
      if (i == files_.size()) files_.push_back(site.file);
      recent_ = site.file;
      recent_number_ = static_cast<uint32_t>(i) << kLineBits;
    }
    return recent_number_ | (static_cast<uint32_t>(site.line) & kLineMask);
  }
  std::string text_of(uint32_t number) const {
    const uint32_t file = (number & ~kFlag) >> kLineBits;
    return execution::text_of(Site{file < files_.size() ? files_[file] : "?", static_cast<int>(number & kLineMask)});
  }

 private:
  static constexpr uint32_t kLineBits = 20, kLineMask = (1u << kLineBits) - 1;
  std::vector<const char*> files_;
  const char* recent_ = nullptr;
  uint32_t recent_number_ = 0;
};

// xorshift64*: any order will do, but the same one on every machine, and cheap.
class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15u | 1u; }
  uint32_t below(uint32_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du >> 32) * bound >> 32);
  }

 private:
  uint64_t state_ = 1;
};

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  char bytes[16];  // of the source when the copy was issued
  int group;
  Site site;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in the block
  int lane = 0;
  Group who{};
  Meeting waits_for = Meeting::kNone;
  Site site{};  // where it waits
  std::vector<Copy> copies;
  int committed_groups = 0;
};

struct Warp {
  uint32_t ready = 0;    // lanes that can run
  uint32_t arrived = 0;  // lanes that wait for the others, at:
  Meeting meeting = Meeting::kNone;
  Site site{};
  uint32_t ended = 0;
  Time met = 0;                // when all lanes have met last, be it as a warp, a block or a team
  std::vector<Time> meetings;  // of the warp alone; for messages
  // operands and results of collectives
  uint32_t in[32], out[32];
  const void* rows[32];
  uint32_t* results[32];
  MatrixOperands operands;
};

struct Block {
  int index = 0;
  int slot = 0;     // among the resident blocks
  int arrived = 0;  // threads that wait in sync_block, at:
  Site site{};
  int ended = 0;
  Time started = 0, met = 0;
  std::vector<Time> meetings, team_meetings;
  Warp* warps = nullptr;
  char* shared = nullptr;
  std::unique_ptr<Shadow> shadow;
  std::vector<Time> met_with;  // by slot: when this block has last met that one, directly or through others
};

struct Team {
  int blocks = 0;
  int arrived = 0;  // threads
  Site site{};
  std::vector<Block*> members;
};

class Executor {
 public:
  Executor(Memory::Ranges& memory, int blocks, int threads, size_t shared_bytes, bool cooperative,
           const std::function<void()>& kernel, const Options& options);
  ~Executor();
  void run();

  Thread& self() { return *self_; }
  int block_count() const { return block_count_; }
  int block_threads() const { return block_threads_; }

  void access(Access access, const void* pointer, size_t bytes, Site site, bool in_flight);
  void meet_as_warp(Meeting meeting, Site site, void (*last)(Warp&));
  void meet_as_block(Site site);
  void meet_as_team(TeamBarrier* barrier, int blocks, Site site);
  void issue_copy(void* shared, const void* global, Site site);
  void wait_for_copies(int pending);

 private:
  static void enter();
  void end_thread();
  void run_resident(int first_block);
  int pick();
  void suspend(Meeting meeting, Site site);
  void resume(Block& block);
  // Unwinds the running thread's stack up to enter(), which ends the launch.
  [[noreturn]] void fail(const std::string& message) { throw Failure(message); }

  // One word of an access.
  struct Place {
    const Range* range = nullptr;  // null: shared memory
    uintptr_t begin = 0, address = 0;
    Time valid_since = 0;    // accesses before this time precede all that happens now
    Time written_since = 0;  // a word whose last write is earlier holds nothing
    uint32_t site = 0, flag = 0;
  };
  bool ordered(const Record& record, Time valid_since) const;
  void read(Word& word, const Place& place);
  void write(Word& word, const Place& place);
  Group joined(Group readers);
  uint32_t set_with(uint32_t set, uint32_t block);

  std::string describe(const Thread& thread) const;
  std::string describe(Group who) const;
  std::string describe(const Place& place) const;
  std::string meetings_before(Group who, Time time) const;
  [[noreturn]] void fail_outside(const void* pointer, size_t bytes, bool shared, const char* verb, Site site);
  [[noreturn]] void fail_race(const char* verb, const char* earlier_verb, const Record& earlier, const Place& place);
  [[noreturn]] void fail_in_flight(const char* verb, const Record& copy, const Place& place);
  std::string waiting_threads() const;

  Memory::Ranges& memory_;
  const std::function<void()>& kernel_;
  const int block_count_, block_threads_, resident_;
  const size_t shared_bytes_;
  const bool cooperative_, shuffled_;
  Random random_;
  SiteTable sites_;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<char> shared_storage_;
  std::map<TeamBarrier*, Team> teams_;
  // Sets of blocks, numbered, and what set results from adding a block to one.
  std::vector<std::vector<bool>> sets_;
  std::map<std::vector<bool>, uint32_t> set_numbers_;
  std::unordered_map<uint64_t, uint32_t> larger_sets_;

  Fiber main_;
  Thread* self_ = nullptr;
  int live_ = 0;
  Time started_ = 0;
  std::exception_ptr exception_;
};

Executor* executor = nullptr;

// Stacks are kept for the next launch: mapping and unmapping hundreds of them takes longer than a small kernel.
std::vector<std::unique_ptr<Fiber>>& spare_fibers() {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  return fibers;
}

// ---- scheduling

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
  if (blocks < 1 || blocks > static_cast<int>(Group::kMaxBlocks))
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
  const int groups = block_count_ / resident_;
  std::vector<int> order(static_cast<size_t>(groups));
  for (int i = 0; i < groups; ++i) order[i] = i;
  if (shuffled_)
    for (int i = groups - 1; i > 0; --i) std::swap(order[i], order[random_.below(static_cast<uint32_t>(i) + 1)]);
  for (const int group : order) run_resident(group * resident_);
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
    thread.who =
        Group::make(Group::kThread, static_cast<uint32_t>(thread.block->index), static_cast<uint32_t>(thread.index));
    thread.waits_for = Meeting::kNone;
    thread.copies.clear();
    thread.committed_groups = 0;
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

// ---- meetings

void Executor::meet_as_warp(Meeting meeting, Site site, void (*last)(Warp&)) {
  Thread& me = *self_;
  Warp& warp = *me.warp;
  if (warp.ended != 0)
    fail(describe(me) + " waits in " + name_of(meeting) + " at " + text_of(site) +
         ", but lanes of its warp have ended");
  if (warp.arrived == 0) {
    warp.meeting = meeting;
    warp.site = site;
  } else if (warp.meeting != meeting || !(warp.site == site)) {
    fail("lanes of one warp part: " + describe(me) + " waits in " + name_of(meeting) + " at " + text_of(site) +
         ", others in " + name_of(warp.meeting) + " at " + text_of(warp.site));
  }
  warp.arrived |= 1u << me.lane;
  if (warp.arrived != kAllLanes) {
    suspend(meeting, site);
    return;
  }
  if (last != nullptr) last(warp);
  warp.arrived = 0;
  warp.ready = kAllLanes;
  if (meeting == Meeting::kSyncWarp) {
    warp.met = advance();
    warp.meetings.push_back(warp.met);
  }
}

// All threads of the block have met.
void Executor::resume(Block& block) {
  block.met = now();
  block.meetings.push_back(block.met);
  for (int w = 0; w < block_threads_ / kWarpThreads; ++w) {
    block.warps[w].met = block.met;
    block.warps[w].ready = kAllLanes;
  }
}

void Executor::meet_as_block(Site site) {
  Thread& me = *self_;
  Block& block = *me.block;
  if (block.ended != 0)
    fail(describe(me) + " waits in sync_block at " + text_of(site) + ", but threads of its block have ended");
  if (block.arrived == 0) {
    block.site = site;
  } else if (!(block.site == site)) {
    fail("threads of one block part: " + describe(me) + " waits in sync_block at " + text_of(site) + ", others at " +
         text_of(block.site));
  }
  if (++block.arrived < block_threads_) {
    suspend(Meeting::kSyncBlock, site);
    return;
  }
  block.arrived = 0;
  advance();
  resume(block);
}

void Executor::meet_as_team(TeamBarrier* barrier, int blocks, Site site) {
  Thread& me = *self_;
  const auto explain = [&](const std::string& problem) {
    fail(describe(me) + " waits in sync_team at " + text_of(site) + ", but " + problem);
  };
  if (!cooperative_) explain("the launch is not cooperative: blocks of the team may never run together");
  if (blocks < 1 || blocks > block_count_)
    explain("a team of " + std::to_string(blocks) + " blocks is expected where " + std::to_string(block_count_) +
            " were launched");
  const uintptr_t address = reinterpret_cast<uintptr_t>(barrier);
  Range* range = memory_.find(address, sizeof(TeamBarrier));
  if (range == nullptr) fail_outside(barrier, sizeof(TeamBarrier), false, "meets at", site);
  if (address % alignof(TeamBarrier) != 0) explain("the barrier is not aligned to a line of the cache");
  const auto found = teams_.find(barrier);
  Team& team = found == teams_.end() ? teams_[barrier] : found->second;
  if (found == teams_.end()) {
    range->shadow.visit(address, sizeof(uint32_t), false, [&](Word& word, uintptr_t) {
      if (word.write.time == 0 && !range->initialised) explain("nothing has set the barrier to zero");
      if (word.write.time >= started_) explain("the barrier has been written to in this launch");
    });
    if (barrier->arrivals != 0) explain("the barrier is not zero when the launch starts");
  }
  if (team.arrived == 0) {
    team.blocks = blocks;
    team.site = site;
    team.members.clear();
  } else if (team.blocks != blocks || !(team.site == site)) {
    explain("others wait for a team of " + std::to_string(team.blocks) + " blocks at " + text_of(team.site));
  }
  if (std::find(team.members.begin(), team.members.end(), me.block) == team.members.end())
    team.members.push_back(me.block);
  if (static_cast<int>(team.members.size()) > blocks) explain("more blocks than the team has meet at one barrier");
  if (++team.arrived < blocks * block_threads_) {
    suspend(Meeting::kSyncTeam, site);
    return;
  }
  team.arrived = 0;
  barrier->arrivals += static_cast<uint32_t>(blocks);
  const Time met = advance();
  // Whoever met a member before has now, through it, met all of them.
  std::vector<Time> met_with(static_cast<size_t>(resident_), 0);
  for (const Block* member : team.members)
    for (int b = 0; b < resident_; ++b) met_with[b] = std::max(met_with[b], member->met_with[b]);
  for (const Block* member : team.members) met_with[member->slot] = met;
  for (Block* member : team.members) {
    member->met_with = met_with;
    member->team_meetings.push_back(met);
    resume(*member);
  }
}

// ---- accesses

// Whether the accesses of a record precede, by barriers, what the running thread does now.
bool Executor::ordered(const Record& record, Time valid_since) const {
  const Group who = record.who;
  if (record.time < valid_since || who == self_->who) return true;
  const Block& block = *self_->block;
  if (who.kind() == Group::kBlocks) {
    if (!cooperative_) return false;
    const std::vector<bool>& set = sets_[who.block()];
    for (int b = 0; b < resident_; ++b)
      if (set[b] && record.time >= (b == block.slot ? block.met : block.met_with[b])) return false;
    return true;
  }
  if (static_cast<int>(who.block()) != block.index) return cooperative_ && record.time < block.met_with[who.block()];
  const bool same_warp = who.kind() != Group::kBlock && (who.thread() ^ self_->who.thread()) < kWarpThreads;
  return record.time < (same_warp ? self_->warp->met : block.met);
}

// The smallest group with these readers and the running thread.
Group Executor::joined(Group readers) {
  const uint32_t block = static_cast<uint32_t>(self_->block->index), thread = self_->who.thread();
  const bool several = readers.kind() == Group::kBlocks;
  if (several || readers.block() != block) {
    // Without teams nothing orders two blocks; which they are does not matter.
    if (!cooperative_) return Group::make(Group::kBlocks, 0, 0);
    const uint32_t set = several ? readers.block() : set_with(0, readers.block());
    return Group::make(Group::kBlocks, set_with(set, block), 0);
  }
  if (readers.kind() == Group::kBlock || (readers.thread() ^ thread) >= kWarpThreads)
    return Group::make(Group::kBlock, block, 0);
  return Group::make(Group::kWarp, block, thread / kWarpThreads * kWarpThreads);
}

uint32_t Executor::set_with(uint32_t set, uint32_t block) {
  if (sets_.empty()) sets_.emplace_back(resident_, false);  // the empty set is number 0
  const uint64_t key = static_cast<uint64_t>(set) << 32 | block;
  const auto known = larger_sets_.find(key);
  if (known != larger_sets_.end()) return known->second;
  std::vector<bool> members = sets_[set];
  members[block] = true;
  const auto [entry, is_new] = set_numbers_.emplace(members, static_cast<uint32_t>(sets_.size()));
  if (is_new) {
    if (sets_.size() == Group::kMaxBlocks - 1) fail("more sets of blocks share words than can be told apart");
    sets_.push_back(members);
  }
  larger_sets_[key] = entry->second;
  return entry->second;
}

void Executor::read(Word& word, const Place& place) {
  if (word.write.time < place.written_since)
    fail(describe(*self_) + " loads " + describe(place) + " at " + sites_.text_of(place.site) +
         ", which nothing has written");
  if (word.write.time >= place.valid_since) {
    if (word.write.site & kFlag) fail_in_flight("loads", word.write, place);
    if (!ordered(word.write, place.valid_since)) fail_race("loads", "stored", word.write, place);
    if (place.flag)
      fail(describe(*self_) + " loads " + describe(place) + " by load_constant at " + sites_.text_of(place.site) +
           ", but " + describe(word.write.who) + " stored it in the same launch at " + sites_.text_of(word.write.site));
  }
  const bool current = word.read.time >= place.valid_since;
  if (place.flag) {  // whoever writes it in this launch is at fault, ordered or not
    if (!current || !(word.read.site & kFlag)) word.read = {self_->who, now(), place.site | kFlag};
    return;
  }
  const uint32_t flag = current ? word.read.site & kFlag : 0;
  const bool alone = !current || ordered(word.read, place.valid_since);
  word.read = {alone ? self_->who : joined(word.read.who), now(), place.site | flag};
}

void Executor::write(Word& word, const Place& place) {
  if (word.write.time >= place.valid_since) {
    if (word.write.site & kFlag) fail_in_flight("stores", word.write, place);
    if (!ordered(word.write, place.valid_since)) fail_race("stores", "stored", word.write, place);
  }
  if (word.read.time >= place.valid_since) {
    if (word.read.site & kFlag)
      fail(describe(*self_) + " stores " + describe(place) + " at " + sites_.text_of(place.site) + ", but " +
           describe(word.read.who) + " loaded it by load_constant in the same launch, last at " +
           sites_.text_of(word.read.site));
    if (!ordered(word.read, place.valid_since)) fail_race("stores", "loaded", word.read, place);
  }
  word.write = {self_->who, now(), place.site | place.flag};
  word.read = {Group{}, 0, 0};
}

void Executor::access(Access access, const void* pointer, size_t bytes, Site site, bool in_flight) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const bool store = access == Access::kStoreGlobal || access == Access::kStoreShared;
  const bool shared = access == Access::kLoadShared || access == Access::kStoreShared;
  const char* verb = store ? "stores" : "loads";
  Place place;
  place.site = sites_.number_of(site);
  place.flag = access == Access::kLoadConstant || in_flight ? kFlag : 0;
  Shadow* shadow;
  if (shared) {
    const Block& block = *self_->block;
    place.begin = reinterpret_cast<uintptr_t>(block.shared);
    if (address < place.begin || address - place.begin + bytes > shared_bytes_)
      fail_outside(pointer, bytes, true, verb, site);
    place.valid_since = place.written_since = block.started;
    shadow = block.shadow.get();
  } else {
    Range* range = memory_.find(address, bytes);
    if (range == nullptr) fail_outside(pointer, bytes, false, verb, site);
    place.range = range;
    place.begin = range->begin;
    place.valid_since = started_;
    place.written_since = range->initialised ? 0 : 1;
    shadow = &range->shadow;
  }
  place.address = address;
  if (address % bytes != 0)
    fail(describe(*self_) + " " + verb + " " + std::to_string(bytes) + " bytes from " + describe(place) + " on at " +
         text_of(site) + ", which is not aligned to them");
  if (place.range != nullptr && place.range->constant) {
    if (store) fail(describe(*self_) + " stores " + describe(place) + " at " + text_of(site) + ", which is constant");
    return;
  }
  shadow->visit(address, bytes, store, [&](Word& word, uintptr_t at) {
    place.address = at;
    if (store)
      write(word, place);
    else
      read(word, place);
  });
}

// ---- asynchronous copies

void Executor::issue_copy(void* shared, const void* global, Site site) {
  access(Access::kLoadGlobal, global, 16, site, false);
  access(Access::kStoreShared, shared, 16, site, true);
  Copy copy{shared, global, {}, self_->committed_groups, site};
  std::memcpy(copy.bytes, global, 16);
  self_->copies.push_back(copy);
}

void Executor::wait_for_copies(int pending) {
  Thread& me = *self_;
  size_t kept = 0;
  for (const Copy& copy : me.copies) {
    if (copy.group >= me.committed_groups - pending) {
      me.copies[kept++] = copy;
      continue;
    }
    if (std::memcmp(copy.bytes, copy.from, 16) != 0)
      fail(describe(me) + " waits for an asynchronous copy, issued at " + text_of(copy.site) +
           ", whose source has been written to since");
    std::memcpy(copy.to, copy.from, 16);
    const Record arrived{me.who, now(), sites_.number_of(copy.site)};
    me.block->shadow->visit(reinterpret_cast<uintptr_t>(copy.to), 16, true,
                            [&](Word& word, uintptr_t) { word = Word{arrived, {Group{}, 0, 0}}; });
  }
  me.copies.resize(kept);
}

// ---- messages

std::string Executor::describe(const Thread& thread) const { return describe(thread.who); }

std::string Executor::describe(Group who) const {
  const std::string block = " of block " + std::to_string(who.block());
  switch (who.kind()) {
    case Group::kThread: return "thread " + std::to_string(who.thread()) + block;
    case Group::kWarp: return "lanes of warp " + std::to_string(who.thread() / kWarpThreads) + block;
    case Group::kBlock: return "threads" + block;
    case Group::kBlocks: return "threads of several blocks";
  }
  return "?";
}

std::string Executor::describe(const Place& place) const {
  return "byte " + std::to_string(place.address - place.begin) + " of " +
         (place.range == nullptr ? "shared memory" : "'" + place.range->name + "'");
}

// How often the group had met by then, as far as that is known: blocks that have ended are forgotten.
std::string Executor::meetings_before(Group who, Time time) const {
  if (who.kind() == Group::kBlocks) return "";
  for (const Block& block : blocks_) {
    if (block.index != static_cast<int>(who.block())) continue;
    const auto before = [time](const std::vector<Time>& meetings) {
      return std::to_string(std::upper_bound(meetings.begin(), meetings.end(), time) - meetings.begin());
    };
    const auto of_team = std::upper_bound(block.team_meetings.begin(), block.team_meetings.end(), time);
    const auto of_block = std::upper_bound(block.meetings.begin(), block.meetings.end(), time);
    const auto team_count = of_team - block.team_meetings.begin();
    std::string text = " (after ";
    if (cooperative_) text += std::to_string(team_count) + " sync_team, ";
    text += std::to_string(of_block - block.meetings.begin() - team_count) + " sync_block";
    if (who.kind() != Group::kBlock)
      text += ", " + before(block.warps[who.thread() / kWarpThreads].meetings) + " sync_warp";
    return text + ")";
  }
  return "";
}

void Executor::fail_race(const char* verb, const char* earlier_verb, const Record& earlier, const Place& place) {
  fail("race: " + describe(*self_) + " " + verb + " " + describe(place) + " at " + sites_.text_of(place.site) +
       meetings_before(self_->who, now()) + ", " + describe(earlier.who) + " " + earlier_verb + " it at " +
       sites_.text_of(earlier.site) + meetings_before(earlier.who, earlier.time) + ", and no barrier orders the two");
}

void Executor::fail_in_flight(const char* verb, const Record& copy, const Place& place) {
  fail(describe(*self_) + " " + verb + " " + describe(place) + " at " + sites_.text_of(place.site) +
       " while an asynchronous copy to it is on its way: " + describe(copy.who) + " issued it at " +
       sites_.text_of(copy.site) + " and has not waited for it");
}

void Executor::fail_outside(const void* pointer, size_t bytes, bool shared, const char* verb, Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  std::string where;
  if (shared) {
    const auto offset = static_cast<long long>(address - reinterpret_cast<uintptr_t>(self_->block->shared));
    where =
        "byte " + std::to_string(offset) + " of shared memory, of which the block has " + std::to_string(shared_bytes_);
  } else if (const Range* range = memory_.at_or_before(address)) {
    where = "byte " + std::to_string(address - range->begin) + " of '" + range->name + "', which has " +
            std::to_string(range->end - range->begin);
  } else {
    where = "memory that lies before everything a kernel may touch";
  }
  fail("out of bounds: " + describe(*self_) + " " + verb + " " + std::to_string(bytes) + " bytes at " + text_of(site) +
       " from " + where);
}

// Who waits where, each place once with how many wait there and an example.
std::string Executor::waiting_threads() const {
  struct Crowd {
    int count = 0;
    const Thread* first = nullptr;
  };
  std::map<std::string, Crowd> crowds;
  for (const Thread& thread : threads_) {
    std::string where = name_of(thread.waits_for);
    if (thread.waits_for != Meeting::kEnd) where += " at " + text_of(thread.site);
    Crowd& crowd = crowds[where];
    if (crowd.count++ == 0) crowd.first = &thread;
  }
  std::string text;
  for (const auto& [where, crowd] : crowds)
    text += (text.empty() ? "" : "; ") + std::to_string(crowd.count) +
            (crowd.first->waits_for == Meeting::kEnd ? " have reached " : " wait in ") + where + " (" +
            describe(*crowd.first) + (crowd.count > 1 ? " and others)" : ")");
  return text;
}

}  // namespace

// ---- what kernels and drivers call

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

int thread_index() { return executor->self().index; }
int block_index() { return executor->self().block->index; }
int block_count() { return executor->block_count(); }
int block_threads() { return executor->block_threads(); }
char* shared_memory() { return executor->self().block->shared; }

void check_access(Access access, const void* address, size_t bytes, Site site) {
  executor->access(access, address, bytes, site, false);
}

void copy_async_16(void* shared, const void* global, Site site) { executor->issue_copy(shared, global, site); }
void copy_async_commit() { ++executor->self().committed_groups; }
void copy_async_wait(int pending) { executor->wait_for_copies(pending); }

void sync_warp(Site site) { executor->meet_as_warp(Meeting::kSyncWarp, site, nullptr); }
void sync_block(Site site) { executor->meet_as_block(site); }
void sync_team(TeamBarrier* barrier, int blocks, Site site) { executor->meet_as_team(barrier, blocks, site); }

uint32_t shuffle_xor(uint32_t value, int mask, Site site) {
  Thread& me = executor->self();
  me.warp->in[me.lane] = value;
  executor->meet_as_warp(Meeting::kShuffle, site, [](Warp& warp) { std::memcpy(warp.out, warp.in, sizeof(warp.out)); });
  return me.warp->out[(me.lane ^ mask) % kWarpThreads];
}

uint32_t shuffle_from(uint32_t value, int lane, Site site) {
  Thread& me = executor->self();
  me.warp->in[me.lane] = value;
  executor->meet_as_warp(Meeting::kShuffleFrom, site,
                         [](Warp& warp) { std::memcpy(warp.out, warp.in, sizeof(warp.out)); });
  return me.warp->out[lane % kWarpThreads];
}

uint32_t transpose_8x8(uint32_t row, Site site) {
  Thread& me = executor->self();
  me.warp->in[me.lane] = row;
  executor->meet_as_warp(Meeting::kTranspose, site, [](Warp& warp) { transpose_fragments(warp.in, warp.out); });
  return me.warp->out[me.lane];
}

void load_matrix_transposed(uint32_t (&r)[4], const void* shared_row, Site site) {
  Thread& me = executor->self();
  executor->access(Access::kLoadShared, shared_row, 16, site, false);
  me.warp->rows[me.lane] = shared_row;
  me.warp->results[me.lane] = r;
  executor->meet_as_warp(Meeting::kLoadMatrix, site,
                         [](Warp& warp) { load_matrix_fragments(warp.rows, warp.results); });
}

void multiply_accumulate(Format format, float (&c)[4], const Vec4& a, uint32_t b0, uint32_t b1, Site site) {
  Thread& me = executor->self();
  MatrixOperands& operands = me.warp->operands;
  std::memcpy(operands.a[me.lane], &a, sizeof(a));
  std::memcpy(&operands.b[me.lane][0], &b0, sizeof(b0));
  std::memcpy(&operands.b[me.lane][2], &b1, sizeof(b1));
  operands.c[me.lane] = c;
  executor->meet_as_warp(
      Meeting::kMultiply, site,
      format == Format::kHalf ? [](Warp& warp) { multiply_accumulate_fragments(Format::kHalf, warp.operands); }
                              : [](Warp& warp) { multiply_accumulate_fragments(Format::kBfloat16, warp.operands); });
}

uint16_t round_to(Format format, float value) {
  return format == Format::kHalf ? round_to_half(value) : round_to_bfloat16(value);
}
float value_of(Format format, uint16_t bits) {
  return format == Format::kHalf ? value_of_half(bits) : value_of_bfloat16(bits);
}

}  // namespace defgan::cuda::execution
