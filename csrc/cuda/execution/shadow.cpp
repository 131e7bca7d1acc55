#include "shadow.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>

namespace defgan::cuda::execution {

Time advance() {
  if (current_time == ~Time{0}) throw std::runtime_error("more barriers than one process can count; run fewer steps");
  return ++current_time;
}

Shadow::Shadow(uintptr_t base, size_t bytes) : base_(base / 4 * 4) {
  mapped_bytes_ = ((base + bytes - base_ + 3) / 4 + 1) * sizeof(Word);
  void* mapped =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  words_ = static_cast<Word*>(mapped);
}

Shadow::~Shadow() { munmap(words_, mapped_bytes_); }

void Shadow::split(Word& word) {
  uint32_t index;
  if (free_.empty()) {
    index = static_cast<uint32_t>(pieces_.size());
    pieces_.emplace_back();
  } else {
    index = free_.back();
    free_.pop_back();
  }
  pieces_[index].fill(word);
  word.write.who = kSplit;
  word.write.site = index;
}

Range::Range(std::string name_, const void* data, size_t bytes, bool initialised_, bool constant_)
    : name(std::move(name_)),
      begin(reinterpret_cast<uintptr_t>(data)),
      end(begin + bytes),
      initialised(initialised_),
      constant(constant_),
      shadow(begin, bytes) {}

Range* Memory::Ranges::at_or_before(uintptr_t address) {
  auto next = ranges_.upper_bound(address);
  return next == ranges_.begin() ? nullptr : std::prev(next)->second.get();
}

void Memory::Ranges::add(const std::string& name, const void* data, size_t bytes, bool initialised, bool constant) {
  if (bytes == 0) return;  // as of an empty tensor, whose address may be another's, or null
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const auto next = ranges_.lower_bound(begin);
  const Range* before = begin == 0 ? nullptr : at_or_before(begin - 1);
  if ((next != ranges_.end() && next->first < begin + bytes) || (before != nullptr && before->end > begin) ||
      ranges_.count(begin) != 0)
    throw std::invalid_argument("memory '" + name + "' overlaps another range");
  ranges_[begin] = std::make_unique<Range>(name, data, bytes, initialised, constant);
}

void Memory::Ranges::remove(const void* data) {
  recent_ = nullptr;
  if (ranges_.erase(reinterpret_cast<uintptr_t>(data)) == 0)
    throw std::invalid_argument("no range of memory begins there");
}

Memory::Memory() : ranges_(new Ranges) {}
Memory::~Memory() = default;

void Memory::add(const std::string& name, void* data, size_t bytes, bool initialised) {
  ranges_->add(name, data, bytes, initialised, false);
  if (!initialised) std::memset(data, 0xff, bytes);
}

void Memory::add(const std::string& name, const void* data, size_t bytes) {
  ranges_->add(name, data, bytes, true, true);
}

void Memory::mark_initialised(const void* data, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  Range* range = ranges_->find(address, bytes);
  if (range == nullptr) throw std::invalid_argument("these bytes are not within one range of memory");
  range->shadow.visit(address, bytes, true,
                      [](Word& word, uintptr_t) { word = Word{{ThreadSet{}, now(), 0}, {ThreadSet{}, 0, 0}}; });
}

void Memory::remove(const void* data) { ranges_->remove(data); }

}  // namespace defgan::cuda::execution
