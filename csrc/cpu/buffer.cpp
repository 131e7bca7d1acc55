#include "buffer.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>

namespace defgan::cpu {
namespace {

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Large buffers (weights above all, streamed once a step) ask for huge pages: with small ones every page of the stream
// would miss the TLB.
constexpr size_t kLine = 64, kHugePage = size_t(2) << 20;
size_t alignment_of(size_t bytes) { return bytes >= kHugePage / 2 ? kHugePage : kLine; }

}  // namespace

size_t Buffer::allocated_bytes(size_t bytes) { return round_up(std::max<size_t>(bytes, 1), alignment_of(bytes)); }

Buffer::Buffer(size_t bytes) : size_(bytes) {
  const size_t alignment = alignment_of(bytes), allocated = allocated_bytes(bytes);
  data_.reset(static_cast<char*>(std::aligned_alloc(alignment, allocated)));
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data_.get(), allocated, MADV_HUGEPAGE);  // a wish: failing changes nothing
#endif
  std::memset(data_.get(), 0, std::min(allocated, round_up(bytes, kLine)));
}

}  // namespace defgan::cpu
