// A plan with its weights packed for one instruction set and precision: everything of a projection that
// does not depend on images or latents. Immutable once built; shared by threads and kept in a cache.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../geometry.h"
#include "buffer.h"
#include "instruction_sets.h"

namespace defgan::cpu {

enum class Precision { kFloat32, kBfloat16 };

// A run of links in one dimension with equal steps: one tap over neighbouring positions.
struct Run {
  int set, source, destination, count, source_step, destination_step;
};

// How the taps of a single row are computed: one after the other, each over rectangles of neighbouring positions.
struct TapRuns {
  std::vector<Run> vertical, horizontal;
  int horizontal_sets;
  int source_width, destination_width;  // positions
  int phases;  // of the source along x: positions are stored in phase order, so that a run's are neighbours
};

// How the latent's gradient is taken from the first layer's forward weights: its taps, each with the destination of the
// forward pass as its source.
struct LatentGradient {
  std::vector<Tap> taps;
};

// Where a panel's kernels stop: a destination position, or one and its twin. Meanwhile the stop's share of the weights
// that come next is fetched: from this channel step of the panel on (counted through all matrices and on into the next
// panel), so many steps for each of its own.
struct Stop {
  int position;
  int twin;  // another position with the same matrices, or -1
  int64_t ahead_step;
  float ahead_rate;
};

// One layer in one direction as a gather-GEMM.
struct Gemm {
  const KernelTable* table = nullptr;
  int source_positions = 0, destination_positions = 0;
  int source_channels = 0, destination_channels = 0;
  int matrices = 0;
  Lists<Tap> taps;          // of each destination position
  std::vector<Stop> order;  // those of one phase together, which share matrices, so that these stay in cache
  bool paired = false;      // whether most positions have a twin

  std::optional<TapRuns> tap_runs;                // where a single row takes the tap schedule
  std::optional<LatentGradient> latent_gradient;  // where the latent's gradient is taken from these weights

  int steps = 0;   // dwords of source channels
  int panels = 0;  // full ones
  int tail = 0;    // 1 if a panel of one vector follows
  int64_t matrix_stride = 0, tail_matrix_stride = 0, panel_stride = 0;
  Buffer weights;
  std::vector<float> bias;           // empty for gradients; padded to whole panels
  int64_t bias_position_stride = 0;  // 0: the same bias at every position

  const char* panel(int index) const { return weights.data() + index * panel_stride; }
};

// The affine map of a kMap layer.
struct Map {
  MapTable table;
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

  // The image is read from `image_positions` x rows units that the last layer leaves: the output itself, or, where
  // the image has few channels, one column for every (channel, matrix) pair.
  bool columns = false;
  int image_positions = 0, image_units = 0;
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
