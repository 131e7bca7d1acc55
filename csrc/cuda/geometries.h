// The generators that the fused kernel is compiled for. A geometry has every size that the kernel needs, and lays out
// its shared memory (fused.h says what lies there).
#pragma once

#include "params.h"

namespace defgan::cuda {

// kLatent: k. kWidth: d, the channels of layer 2. kPad: 2 is PyTorch's alignment, 1 TensorFlow's SAME.
// In names, 0, 1 and 2 are the layers' outputs and 3 is the image: kC0 channels, kH0 rows and columns of positions.
template <int kLatent_, int kWidth_, int kPad_>
struct Geometry {
  static constexpr int kLatent = kLatent_, kWidth = kWidth_;
  static constexpr int kPad = kPad_;
  static constexpr int kC0 = 4 * kWidth, kC1 = 2 * kWidth, kC2 = kWidth;
  static constexpr int kH0 = 4, kH1 = 7, kH2 = 14, kH3 = 28;
  static constexpr int kKernel = 5, kTaps = kKernel * kKernel, kPixels = kH3 * kH3;
  static constexpr int kPlane = (kH2 / 2) * (kH2 / 2);  // positions of one phase of layer 2's output

  static constexpr int kBlock = kChunk * kGroupRows * 2;
  static constexpr int kChunks0 = kC0 / kChunk, kChunks1 = kC1 / kChunk, kChunks2 = kC2 / kChunk;
  static constexpr int kLatentChunks = kLatent / kChunk;
  // A position of a plane must hold its channels, and later the 32 float32 sums of its taps' columns.
  static constexpr int kColumnBytes = kChunk * kGroupRows * 4;
  static constexpr int kPlaneBytes = kChunks2 * kBlock > kColumnBytes ? kChunks2 * kBlock : kColumnBytes;

  static constexpr int kHiddenBytes =
      kH0 * kH0 * kChunks0 * kBlock > kPlane* kPlaneBytes ? kH0 * kH0 * kChunks0 * kBlock : kPlane * kPlaneBytes;
  // What begins where, in bytes.
  static constexpr int kHidden = 0;
  static constexpr int kMiddle = kHidden + kHiddenBytes;
  static constexpr int kMask0 = kMiddle + kH1 * kH1 * kChunks1 * kBlock;  // a bit for each half, 16 bits for two chunks
  static constexpr int kMask2 = kMask0 + kH0 * kH0 * (kChunks0 / 2) * kLanes * 2;
  static constexpr int kImage = kMask2 + kH2 * kH2 * kLanes * 2;
  static constexpr int kSlot = kGroupRows * 4;
  static constexpr int kLatentBlocks = kImage + kPixels * kSlot;
  static constexpr int kLatents = kLatentBlocks + kLatentChunks * kBlock;  // float32, 4 of each lane of a tile
  static constexpr int kVelocities = kLatents + kLatent * kGroupRows * 4;
  static constexpr int kZero = kVelocities + kLatent * kGroupRows * 4;
  static constexpr int kZeroBytes = kChunks0 * kBlock;  // as long as the longest source that may be missing
  static constexpr int kSharedBytes = kZero + kZeroBytes;

  static_assert(kWidth % kChunk == 0 && kWidth <= 2 * kChunk, "a mask word holds two chunks of layer 2");
  static_assert(kLatent % kChunk == 0 && kLatent <= 128, "a warp has one tile of 16 latent channels");
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have on sm_90 and sm_100");
};

using MnistGeometry = Geometry<128, 64, 2>;            // MNIST and Fashion-MNIST, PyTorch's alignment
using MnistTensorFlowGeometry = Geometry<128, 64, 1>;  // the same as the released code pads it
using DigitsGeometry = Geometry<64, 32, 2>;

// Calls body(Geometry{}) for the geometry of that index.
template <class Body>
void with_geometry(int geometry, const Body& body) {
  switch (geometry) {
    case 0: return body(MnistGeometry{});
    case 1: return body(MnistTensorFlowGeometry{});
    default: return body(DigitsGeometry{});
  }
}
constexpr int kGeometries = 3;

}  // namespace defgan::cuda
