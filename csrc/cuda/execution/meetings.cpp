// Lets the lanes of a warp, the threads of a block and the blocks of a team meet, and notes when they did.
#include <algorithm>

#include "executor.h"

namespace defgan::cuda::execution {

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

}  // namespace defgan::cuda::execution
