// Memory of the kernels: weights, activations, sums.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace defgan::cpu {

// 64-byte aligned, zeroed.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  char* data() const { return data_.get(); }
  float* floats() const { return reinterpret_cast<float*>(data_.get()); }
  size_t size() const { return size_; }

  // What a buffer of that size takes from the system.
  static size_t allocated_bytes(size_t bytes);

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

}  // namespace defgan::cpu
