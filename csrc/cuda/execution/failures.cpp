// Words a failure in one line: which thread did what, where in the source, to which byte, and what it conflicts with.
#include <algorithm>

#include "executor.h"

namespace defgan::cuda::execution {

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

std::string Executor::describe(const Thread& thread) const { return describe(thread.who); }

std::string Executor::describe(ThreadSet who) const {
  const std::string block = " of block " + std::to_string(who.block());
  switch (who.kind()) {
    case ThreadSet::kThread: return "thread " + std::to_string(who.thread()) + block;
    case ThreadSet::kWarp: return "lanes of warp " + std::to_string(who.thread() / kWarpThreads) + block;
    case ThreadSet::kBlock: return "threads" + block;
    case ThreadSet::kBlocks: return "threads of several blocks";
  }
  return "?";
}

std::string Executor::describe(const Touched& touched) const {
  return "byte " + std::to_string(touched.address - touched.begin) + " of " +
         (touched.range == nullptr ? "shared memory" : "'" + touched.range->name + "'");
}

// How often the set of threads had met by then, as far as that is known: blocks that have ended are forgotten.
std::string Executor::meetings_before(ThreadSet who, Time time) const {
  if (who.kind() == ThreadSet::kBlocks) return "";
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
    if (who.kind() != ThreadSet::kBlock)
      text += ", " + before(block.warps[who.thread() / kWarpThreads].meetings) + " sync_warp";
    return text + ")";
  }
  return "";
}

void Executor::fail_race(const char* verb, const char* earlier_verb, const Record& earlier, const Touched& touched) {
  fail("race: " + describe(*self_) + " " + verb + " " + describe(touched) + " at " + sites_.text_of(touched.site) +
       meetings_before(self_->who, now()) + ", " + describe(earlier.who) + " " + earlier_verb + " it at " +
       sites_.text_of(earlier.site) + meetings_before(earlier.who, earlier.time) + ", and no barrier orders the two");
}

void Executor::fail_in_flight(const char* verb, const Record& copy, const Touched& touched) {
  fail(describe(*self_) + " " + verb + " " + describe(touched) + " at " + sites_.text_of(touched.site) +
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

// Says who waits where: every such point once, with how many wait there and an example.
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

}  // namespace defgan::cuda::execution
