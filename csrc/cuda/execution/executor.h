// One launch on the CPU: its threads, how they take turns, where they meet, and the check of every access.
//
// A thread runs on a fiber until it has to wait for others: at barriers and at warp collectives, never in between. So
// what decides over a race is not the order that happened but whether a barrier forbids the other one.
//
// scheduling.cpp starts threads and lets them take turns, meetings.cpp lets warps, blocks and teams meet, accesses.cpp
// checks loads, stores and asynchronous copies against the shadow memory, failures.cpp words what went wrong.
#pragma once

#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "fragments.h"
#include "launch.h"
#include "primitives.h"
#include "shadow.h"
#include "sites.h"

namespace defgan::cuda::execution {

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

const char* name_of(Meeting meeting);

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

// An asynchronous copy that its thread has issued and not waited for.
struct Copy {
  void* to;
  const void* from;
  char bytes[16];  // of the source when the copy was issued
  int batch;       // how many batches its thread had committed before
  Site site;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in the block
  int lane = 0;
  ThreadSet who{};
  Meeting waits_for = Meeting::kNone;
  Site site{};  // where it waits
  std::vector<Copy> copies;
  int committed_batches = 0;
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

// The blocks that meet at one barrier.
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
  struct Touched {
    const Range* range = nullptr;  // null: shared memory
    uintptr_t begin = 0, address = 0;
    Time valid_since = 0;    // accesses before this time precede all that happens now
    Time written_since = 0;  // a word whose last write is earlier holds nothing
    uint32_t site = 0, flag = 0;
  };
  bool ordered(const Record& record, Time valid_since) const;
  void read(Word& word, const Touched& touched);
  void write(Word& word, const Touched& touched);
  ThreadSet joined(ThreadSet readers);
  uint32_t set_with(uint32_t set, uint32_t block);

  std::string describe(const Thread& thread) const;
  std::string describe(ThreadSet who) const;
  std::string describe(const Touched& touched) const;
  std::string meetings_before(ThreadSet who, Time time) const;
  [[noreturn]] void fail_outside(const void* pointer, size_t bytes, bool shared, const char* verb, Site site);
  [[noreturn]] void fail_race(const char* verb, const char* earlier_verb, const Record& earlier,
                              const Touched& touched);
  [[noreturn]] void fail_in_flight(const char* verb, const Record& copy, const Touched& touched);
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

// The launch that runs now; null between launches.
inline Executor* executor = nullptr;

}  // namespace defgan::cuda::execution
