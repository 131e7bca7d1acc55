// The two schedules for a layer's products. Both take the same sums in the same order, so they give the same bits:
//   the row schedule, for two rows or more: a tile is the group's rows at one output position, all taps in the kernel;
//   the tap schedule, for one row: a tile is up to 14 output positions, one tap after the other, sums in scratch.
// Each call computes the share of one member of a team.
#pragma once

#include "packed_generator.h"
#include "team.h"

namespace defgan::cpu {

// What happens to raw sums when a tile of them is done; without a kernel they stay as they are.
struct Finish {
  FinishKernel kernel = nullptr;
  FinishArgs args{};

  // Channels and places as in FinishArgs.
  void operator()(int channel_begin, int channel_end, Range places) const {
    if (!kernel) return;
    FinishArgs tile = args;
    tile.channel_begin = channel_begin;
    tile.channel_end = channel_end;
    tile.place_begin = places.begin;
    tile.place_end = places.end;
    kernel(tile);
  }
};

// One layer in one direction for a group of rows.
struct LayerWork {
  const char* source;
  int rows;  // of each position
  char* destination;
  Epilogue epilogue;
  Activation activation;  // of the epilogue
  float slope;
  Finish finish;  // of sums that the epilogue leaves raw
};

void row_schedule(const Gemm& gemm, const LayerWork& work, const Member& me);

// work.destination is scratch, whose sums work.finish turns into what the layer leaves.
void tap_schedule(const Gemm& gemm, const LayerWork& work, const Member& me);

// The latent's gradient by panels of the first layer's forward weights. `sums`: float32 units of the latent, for each panel.
void sum_latent_panels(const Gemm& gemm, const char* source, int rows, float* sums, const Member& me);

// Adds the panels' sums up, in order: units [units.begin, units.end) of the latent's gradient.
void add_latent_panels(const Gemm& gemm, const float* sums, int rows, Range units, float* gradient);

}  // namespace defgan::cpu
