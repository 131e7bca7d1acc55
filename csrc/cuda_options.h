// The names that users give to what csrc/cuda/ offers, and what the two files of the op tell each other. No torch.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/enqueue.h"

namespace defgan {

namespace cuda {

inline Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "float16") return Precision::kFloat16;
  if (name == "bfloat16") return Precision::kBfloat16;
  throw std::invalid_argument("precision must be \"float32\", \"float16\" or \"bfloat16\" on CUDA, got \"" + name +
                              "\"");
}

inline Mapping mapping_of(const std::string& name) {
  for (const Mapping mapping : {Mapping::kAuto, Mapping::kFused, Mapping::kLayered, Mapping::kSplit})
    if (name == name_of(mapping)) return mapping;
  throw std::invalid_argument("mapping must be \"auto\", \"fused\", \"layered\" or \"split\", got \"" + name + "\"");
}

// $DEFGAN_CUDA_MAPPING forces one, for tests and measurements; read at every call.
inline Mapping wanted_mapping() {
  const char* forced = std::getenv("DEFGAN_CUDA_MAPPING");
  if (forced == nullptr || *forced == 0) return Mapping::kAuto;
  try {
    return mapping_of(forced);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("DEFGAN_CUDA_MAPPING: ") + error.what());
  }
}

}  // namespace cuda

// The toolkit that the CUDA half was compiled with, "13.0".
std::string cuda_toolkit();

}  // namespace defgan
