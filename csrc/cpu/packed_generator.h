// A plan with its weights packed for one instruction set and precision: everything of a projection that
// does not depend on images or latents. Immutable once built; shared by threads and kept in a cache.
#pragma once

#include <memory>
#include <vector>

#include "buffer.h"
#include "instruction_sets.h"

namespace defgan::cpu {

enum class Precision { kFloat32, kBfloat16 };

// A run of links in one dimension with equal steps: one tap over neighbouring positions.
struct Run {
  int set, source, destination, count, source_step, destination_step;
};

// A destination position in the order in which a panel computes them, or two that a kernel may take together.
// Meanwhile its share of the weights that come
// next is fetched: from this step of the panel on (counted through all matrices and on into the next panel), so many
// steps for each of its own.
struct Place {
  int position;
  int twin;  // another one with the same matrices, or -1
  int64_t ahead_step;
  float ahead_rate;
};

// One layer in one direction as a gather-GEMM.
struct Gemm {
  const KernelTable* table = nullptr;
  int source_positions = 0, destination_positions = 0;
  int source_channels = 0, destination_channels = 0;
  int matrices = 0;
  std::vector<int> tap_begin;  // per destination position, and one more
  std::vector<Tap> taps;
  std::vector<Tap> latent_taps;  // of a gradient by these weights: from which destination, by which matrix
  std::vector<Place> order;      // those of one phase together, which share matrices, so that these stay in cache
  bool paired = false;           // whether most positions have a twin

  // The tap schedule of a single row; empty where the layer does not suit it.
  std::vector<Run> vertical, horizontal;
  int horizontal_sets = 0;
  int source_width = 0, destination_width = 0;
  int phases = 1;  // of the source along x: positions are read in phase order, so that a run is contiguous

  int steps = 0;   // dwords of source channels
  int panels = 0;  // full ones
  int tail = 0;    // 1 if a panel of one vector follows
  int64_t matrix_stride = 0, tail_matrix_stride = 0, panel_stride = 0;
  Buffer weights;
  std::vector<float> bias;           // empty for gradients; padded to whole panels
  int64_t bias_position_stride = 0;  // 0: the same bias at every position

  // Whether the gradient of its one source position, the latent, is taken from these weights: where a panel has enough
  // taps for its products to outweigh the sums over lanes in the end (a fully connected network's has one).
  bool gives_latent_gradient() const {
    return source_positions == 1 && taps.size() >= 8 && table->latent[kOnePanel][1];
  }
  bool has_tap_schedule() const { return !horizontal.empty(); }
  const char* panel(int index) const { return weights.data() + index * panel_stride; }
};

// The affine map of a kMap layer.
struct Map {
  std::vector<int> from, to_begin, to;
  std::vector<float> scale, shift;  // [unit][scale_positions][16]
  int scale_positions = 1;
};

struct PackedLayer {
  Layer layer;
  float slope = 1;         // of the ReLU family, 1 for the identity
  Gemm forward, backward;  // of the first layer only the forward one where it gives the latent's gradient, too
  Map map;
  std::vector<int> gradient_order;  // of a single row: where `backward` wants the gradient of each output position
};

struct PackedGenerator {
  Plan plan;
  Precision precision = Precision::kFloat32;
  const InstructionSet* set = nullptr;
  std::vector<PackedLayer> layers;  // all but the last in `precision`
  // All layers in float32: shares the last with `layers`; where precision is bfloat16 it also evaluates the
  // final error and decodes. nullptr where it is this very object.
  std::shared_ptr<const PackedGenerator> exact;

  // The image is read from `image_places` x rows units that the last layer leaves: the output itself, or, where
  // the image has few channels, one column for every (channel, tap) of an input position.
  bool columns = false;
  int image_places = 0, image_units = 0;
  std::vector<int> entry_begin;
  std::vector<PixelEntry> entries;
  std::vector<PixelRun> runs;  // the same, by column
  std::vector<float> pixel_bias;

  int pixels() const { return int(plan.image.elements()); }
  int pixel_stride() const { return (pixels() + 15) / 16 * 16; }
  const PackedGenerator& float32() const { return exact ? *exact : *this; }
  // The kernels of all layers but the last, which is float32.
  const KernelTable* table() const { return precision == Precision::kBfloat16 ? set->bfloat16 : set->float32; }
  size_t bytes() const;
};

struct Parameter {
  const float* data;
  int64_t elements;
};

// Checks the parameters against the plan and packs what both directions read.
std::shared_ptr<const PackedGenerator> pack(const Plan& plan, const std::vector<Parameter>& parameters,
                                            const InstructionSet& set, Precision precision);

}  // namespace defgan::cpu
