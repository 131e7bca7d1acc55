// The buffers that a team needs for a group of rows, allocated once for all groups that it takes.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_generator.h"

namespace defgan::cpu {

inline int64_t units_of(int channels, int unit_channels) { return (channels + unit_channels - 1) / unit_channels; }

// Bytes of a buffer of float32 units, an even number of them: kernels without tails write whole panels. bfloat16 needs
// no more.
inline int64_t buffer_bytes(const Shape& shape, int rows) {
  return 2 * units_of(shape.c, 2 * kUnitFloats) * shape.positions() * rows * kUnitBytes;
}

// Whether an activation is none of the ReLU family, which kernels apply to sums that are in registers.
inline bool is_transcendental(Activation activation) {
  return activation == Activation::kSigmoid || activation == Activation::kTanh;
}

// Whether the latent's gradient is taken from the first layer's forward weights. Every panel of them leaves sums of its
// own then, which are added up in order: so it does not matter which thread computes which panel.
bool takes_latent_gradient(const PackedGenerator& generator);

class Workspace {
 public:
  Workspace(const PackedGenerator& generator, int capacity);  // rows at most
  Workspace(const Workspace&) = delete;

  // Makes it ready for a group of so many rows. Padding channels are not always written, and may be read against
  // weights of zero: they must not hold what another row count or, where `mixed`, another precision left there.
  void prepare(int rows, bool mixed);

  Buffer latent, velocity;            // [row][k]
  Buffer latent_squares;              // double [row][unit]: sums of the latent's squares
  Buffer start_units;                 // the latent as the first layer reads it
  Buffer gradient;                    // the latent's, float32 units
  Buffer latent_sums;                 // the same by panels, where it is taken from the forward weights
  Buffer image, target, image_delta;  // [row][pixel_stride]
  Buffer columns, image_gradient;     // the last layer's sums and their gradient
  Buffer wide;                        // the last layer's input in float32, where it is stored in bfloat16
  std::vector<Buffer> stored;         // the output of each layer but the last; with several rows later its gradient
  std::vector<Buffer> delta;          // a single row's gradient of each of these outputs
  Buffer scratch;                     // sums that rest in float32 until they are finished

 private:
  friend int64_t workspace_bytes(const PackedGenerator& generator, int rows);
  friend int64_t row_bytes(const PackedGenerator& generator);
  Workspace() = default;
  // The one list of the buffers: calls use(buffer, bytes, padding) for each.
  template <class Use>
  void list(const PackedGenerator& generator, int rows, const Use& use);

  int rows_ = 0;                  // that it was prepared for
  std::vector<Buffer*> cleared_;  // by prepare
};

// What a workspace for so many rows allocates.
int64_t workspace_bytes(const PackedGenerator& generator, int rows);

// What another row adds to it, rounding of whole buffers aside.
int64_t row_bytes(const PackedGenerator& generator);

}  // namespace defgan::cpu
