// Checks every load and store against the shadow memory: bounds, alignment, contents, races; and carries out
// asynchronous copies at the moment when a thread waits for them.
#include <cstring>

#include "executor.h"

namespace defgan::cuda::execution {

// Whether the accesses of a record precede, by barriers, what the running thread does now.
bool Executor::ordered(const Record& record, Time valid_since) const {
  const ThreadSet who = record.who;
  if (record.time < valid_since || who == self_->who) return true;
  const Block& block = *self_->block;
  if (who.kind() == ThreadSet::kBlocks) {
    if (!cooperative_) return false;
    const std::vector<bool>& set = sets_[who.block()];
    for (int b = 0; b < resident_; ++b)
      if (set[b] && record.time >= (b == block.slot ? block.met : block.met_with[b])) return false;
    return true;
  }
  if (static_cast<int>(who.block()) != block.index) return cooperative_ && record.time < block.met_with[who.block()];
  const bool same_warp = who.kind() != ThreadSet::kBlock && (who.thread() ^ self_->who.thread()) < kWarpThreads;
  return record.time < (same_warp ? self_->warp->met : block.met);
}

// Returns the smallest warp, block or set of blocks with these readers and the running thread.
ThreadSet Executor::joined(ThreadSet readers) {
  const uint32_t block = static_cast<uint32_t>(self_->block->index), thread = self_->who.thread();
  const bool several = readers.kind() == ThreadSet::kBlocks;
  if (several || readers.block() != block) {
    // Without teams nothing orders two blocks; which they are does not matter.
    if (!cooperative_) return ThreadSet::make(ThreadSet::kBlocks, 0, 0);
    const uint32_t set = several ? readers.block() : set_with(0, readers.block());
    return ThreadSet::make(ThreadSet::kBlocks, set_with(set, block), 0);
  }
  if (readers.kind() == ThreadSet::kBlock || (readers.thread() ^ thread) >= kWarpThreads)
    return ThreadSet::make(ThreadSet::kBlock, block, 0);
  return ThreadSet::make(ThreadSet::kWarp, block, thread / kWarpThreads * kWarpThreads);
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
    if (sets_.size() == ThreadSet::kMaxBlocks - 1) fail("more sets of blocks share words than can be told apart");
    sets_.push_back(members);
  }
  larger_sets_[key] = entry->second;
  return entry->second;
}

void Executor::read(Word& word, const Touched& touched) {
  if (word.write.time < touched.written_since)
    fail(describe(*self_) + " loads " + describe(touched) + " at " + sites_.text_of(touched.site) +
         ", which nothing has written");
  if (word.write.time >= touched.valid_since) {
    if (word.write.site & kFlag) fail_in_flight("loads", word.write, touched);
    if (!ordered(word.write, touched.valid_since)) fail_race("loads", "stored", word.write, touched);
    if (touched.flag)
      fail(describe(*self_) + " loads " + describe(touched) + " by load_constant at " + sites_.text_of(touched.site) +
           ", but " + describe(word.write.who) + " stored it in the same launch at " + sites_.text_of(word.write.site));
  }
  const bool current = word.read.time >= touched.valid_since;
  if (touched.flag) {  // whoever writes it in this launch is at fault, ordered or not
    if (!current || !(word.read.site & kFlag)) word.read = {self_->who, now(), touched.site | kFlag};
    return;
  }
  const uint32_t flag = current ? word.read.site & kFlag : 0;
  const bool alone = !current || ordered(word.read, touched.valid_since);
  word.read = {alone ? self_->who : joined(word.read.who), now(), touched.site | flag};
}

void Executor::write(Word& word, const Touched& touched) {
  if (word.write.time >= touched.valid_since) {
    if (word.write.site & kFlag) fail_in_flight("stores", word.write, touched);
    if (!ordered(word.write, touched.valid_since)) fail_race("stores", "stored", word.write, touched);
  }
  if (word.read.time >= touched.valid_since) {
    if (word.read.site & kFlag)
      fail(describe(*self_) + " stores " + describe(touched) + " at " + sites_.text_of(touched.site) + ", but " +
           describe(word.read.who) + " loaded it by load_constant in the same launch, last at " +
           sites_.text_of(word.read.site));
    if (!ordered(word.read, touched.valid_since)) fail_race("stores", "loaded", word.read, touched);
  }
  word.write = {self_->who, now(), touched.site | touched.flag};
  word.read = {ThreadSet{}, 0, 0};
}

void Executor::access(Access access, const void* pointer, size_t bytes, Site site, bool in_flight) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const bool store = access == Access::kStoreGlobal || access == Access::kStoreShared;
  const bool shared = access == Access::kLoadShared || access == Access::kStoreShared;
  const char* verb = store ? "stores" : "loads";
  Touched touched;
  touched.site = sites_.number_of(site);
  touched.flag = access == Access::kLoadConstant || in_flight ? kFlag : 0;
  Shadow* shadow;
  if (shared) {
    const Block& block = *self_->block;
    touched.begin = reinterpret_cast<uintptr_t>(block.shared);
    if (address < touched.begin || address - touched.begin + bytes > shared_bytes_)
      fail_outside(pointer, bytes, true, verb, site);
    touched.valid_since = touched.written_since = block.started;
    shadow = block.shadow.get();
  } else {
    Range* range = memory_.find(address, bytes);
    if (range == nullptr) fail_outside(pointer, bytes, false, verb, site);
    touched.range = range;
    touched.begin = range->begin;
    touched.valid_since = started_;
    touched.written_since = range->initialised ? 0 : 1;
    shadow = &range->shadow;
  }
  touched.address = address;
  if (address % bytes != 0)
    fail(describe(*self_) + " " + verb + " " + std::to_string(bytes) + " bytes from " + describe(touched) + " on at " +
         text_of(site) + ", which is not aligned to them");
  if (touched.range != nullptr && touched.range->constant) {
    if (store) fail(describe(*self_) + " stores " + describe(touched) + " at " + text_of(site) + ", which is constant");
    return;
  }
  shadow->visit(address, bytes, store, [&](Word& word, uintptr_t at) {
    touched.address = at;
    if (store)
      write(word, touched);
    else
      read(word, touched);
  });
}

// ---- asynchronous copies

void Executor::issue_copy(void* shared, const void* global, Site site) {
  access(Access::kLoadGlobal, global, 16, site, false);
  access(Access::kStoreShared, shared, 16, site, true);
  Copy copy{shared, global, {}, self_->committed_batches, site};
  std::memcpy(copy.bytes, global, 16);
  self_->copies.push_back(copy);
}

void Executor::wait_for_copies(int pending) {
  Thread& me = *self_;
  size_t kept = 0;
  for (const Copy& copy : me.copies) {
    if (copy.batch >= me.committed_batches - pending) {
      me.copies[kept++] = copy;
      continue;
    }
    if (std::memcmp(copy.bytes, copy.from, 16) != 0)
      fail(describe(me) + " waits for an asynchronous copy, issued at " + text_of(copy.site) +
           ", whose source has been written to since");
    std::memcpy(copy.to, copy.from, 16);
    const Record arrived{me.who, now(), sites_.number_of(copy.site)};
    me.block->shadow->visit(reinterpret_cast<uintptr_t>(copy.to), 16, true,
                            [&](Word& word, uintptr_t) { word = Word{arrived, {ThreadSet{}, 0, 0}}; });
  }
  me.copies.resize(kept);
}

}  // namespace defgan::cuda::execution
