// Places in the kernels' source: compared, printed, and kept in the shadow memory as numbers.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "primitives.h"
#include "shadow.h"

namespace defgan::cuda::execution {

inline bool operator==(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::string text_of(Site site) {
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

}  // namespace defgan::cuda::execution
