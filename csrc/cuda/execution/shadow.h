// What is remembered about memory: for every 4 bytes who wrote them last and who has read them since, when, and from
// which line of the kernels. Words that are accessed in smaller pieces are remembered byte by byte until they are
// written as a whole again.
//
// Time is counted in barriers: it advances when a warp, a block or a team has met, and never otherwise. So an access
// precedes another thread's one, as the GPU's memory model has it, if and only if the latest meeting of a warp, a block
// or a team with both threads has a later time than the first access.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "launch.h"

namespace defgan::cuda::execution {

using Time = uint32_t;

// A thread, or the smallest of warp, block and set of blocks with all threads that have read a word and are not ordered
// among themselves.
struct ThreadSet {
  enum Kind : uint32_t { kThread, kWarp, kBlock, kBlocks };

  // thread: its index in the block; of a warp, its first thread. Of kBlocks, `block` numbers a set of blocks.
  static ThreadSet make(Kind kind, uint32_t block, uint32_t thread) { return {kind << 30 | block << 10 | thread}; }
  Kind kind() const { return static_cast<Kind>(code >> 30); }
  uint32_t block() const { return code >> 10 & (kMaxBlocks - 1); }
  uint32_t thread() const { return code & 1023u; }
  bool operator==(ThreadSet other) const { return code == other.code; }

  static constexpr uint32_t kMaxBlocks = 1u << 20;
  uint32_t code;
};

struct Record {
  ThreadSet who;
  Time time;      // 0: never
  uint32_t site;  // an index into the executor's table, with the flag below
};
// Of a write: its bytes are still on their way (an asynchronous copy). Of a read: load_constant was among the readers.
constexpr uint32_t kFlag = 1u << 31;

struct Word {
  Record write, read;  // `read` since the write
};

// The words of one range of memory; costs memory only where it is touched.
class Shadow {
 public:
  Shadow(uintptr_t base, size_t bytes);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  // visit(Word&, address) for every word or byte that is remembered by itself. Writing a whole word joins its bytes.
  template <class Visit>
  void visit(uintptr_t address, size_t bytes, bool write, Visit&& visit) {
    const uintptr_t end = address + bytes;
    while (address < end) {
      Word& word = words_[(address - base_) / 4];
      if (address % 4 == 0 && end - address >= 4) {
        if (!is_split(word)) {
          visit(word, address);
        } else {
          std::array<Word, 4>& pieces = pieces_[word.write.site];
          for (size_t i = 0; i < 4; ++i) visit(pieces[i], address + i);
          if (write) {
            free_.push_back(word.write.site);
            word = pieces[0];
          }
        }
        address += 4;
      } else {
        if (!is_split(word)) split(word);
        visit(pieces_[word.write.site][address % 4], address);
        ++address;
      }
    }
  }

 private:
  static constexpr ThreadSet kSplit{~0u};
  static bool is_split(const Word& word) { return word.write.who == kSplit; }
  void split(Word& word);

  uintptr_t base_;
  size_t mapped_bytes_;
  Word* words_;
  std::vector<std::array<Word, 4>> pieces_;
  std::vector<uint32_t> free_;
};

struct Range {
  Range(std::string name, const void* data, size_t bytes, bool initialised, bool constant);

  std::string name;
  uintptr_t begin, end;
  bool initialised, constant;
  Shadow shadow;
};

class Memory::Ranges {
 public:
  // The range that begins at or before the address, and the one before it in the answer; null where there is none.
  Range* at_or_before(uintptr_t address);
  Range* find(uintptr_t address, size_t bytes) {
    if (recent_ != nullptr && address >= recent_->begin && address + bytes <= recent_->end) return recent_;
    Range* range = at_or_before(address);
    if (range == nullptr || address + bytes > range->end) return nullptr;
    return recent_ = range;
  }
  void add(const std::string& name, const void* data, size_t bytes, bool initialised, bool constant);
  void remove(const void* data);

 private:
  std::map<uintptr_t, std::unique_ptr<Range>> ranges_;
  Range* recent_ = nullptr;
};

// The time of the process, which never goes back, so that nothing has to be forgotten between launches.
inline Time current_time = 1;
inline Time now() { return current_time; }
Time advance();

}  // namespace defgan::cuda::execution
