// What the instruction-set specific files export: one table of function pointers per storage type.
//
// Storage. A unit is 64 bytes of channels of one place, a position of one row: 16 float32 or 32 bfloat16 channels,
// whatever the vector width. A buffer is [unit][position][row][64 bytes]. Both types share every line of code but the
// multiply-add and the load and store of channels.
//
// Weights. A panel is the weights of two vectors of output channels (the last may be one vector), laid out in the order
// of consumption: [matrix][channel step][vectors][vector]. A channel step is one float32 channel or one pair of bfloat16
// channels: one dword, broadcast to all lanes. Tile registers (AMX) take the same layout sixteen steps at a time: a unit
// of sixteen rows is one operand, and sixteen steps of a vector are the other.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../geometry.h"

namespace defgan::cpu {

constexpr int kUnitBytes = 64;
constexpr int kUnitFloats = 16;
constexpr int kMaxTileRows = 32;     // of any kernel
constexpr int kMaxTileSegments = 4;  // lines of positions in one tile of the tap schedule

// How many channels a kernel's tile has: the one vector of a tail, or whole panels.
enum TileWidth { kOneVector, kOnePanel, kTwoPanels, kFourPanels };
constexpr int kTileWidths = 4;
constexpr int panels_of(TileWidth width) { return width == kFourPanels ? 4 : int(width); }
constexpr int vectors_of(TileWidth width) { return width == kOneVector ? 1 : 2 * panels_of(width); }

// What a kernel does with its sums.
enum class Epilogue {
  kRaw,       // stores them as float32 units
  kActivate,  // stores their activation, of the ReLU family
  kGradient,  // multiplies them by the activation's derivative, which the stored output tells, and overwrites that
};
constexpr int kEpilogues = 3;

// destination[row][channels] = epilogue(bias + sum over taps of source[tap.source][row][:] * weights[tap.matrix])
struct GemmArgs {
  const char* source;
  int64_t position_stride, unit_stride;  // bytes
  const Tap* taps;
  int tap_count;
  int steps;  // dwords of channels of the source
  const char* weights;
  int64_t matrix_stride, panel_stride;  // bytes
  char* destination;                    // kRaw: float32 units; else units of the storage type
  int64_t destination_unit_stride;
  const float* bias;      // nullptr: zeros
  const char* ahead;      // weights that come next, fetched into the second-level cache meanwhile (nullptr: are not),
  int64_t ahead_advance;  // this many bytes further with every unit of the source
  Activation activation;
  float slope;
  int rows;  // for kernels that are not made for one number of them
  // The twin's: another position with the same matrices and bias, for kernels that take two at once.
  char* twin_destination;
  const Tap* twin_taps;
};
using GemmKernel = void (*)(const GemmArgs&);

// One tap over a rectangle of positions of a single row, accumulated into float32 units.
struct TapArgs {
  const char* source[kMaxTileSegments];  // contiguous positions
  char* destination[kMaxTileSegments];
  int64_t destination_step;  // bytes between neighbouring positions of a segment
  int64_t unit_stride, destination_unit_stride;
  int positions;  // of a segment; for kernels that are not made for one number
  int steps;
  const char* weights;
  const char* ahead;      // weights that come next, fetched likewise,
  int64_t ahead_advance;  // this many bytes further with every step
};
using TapKernel = void (*)(const TapArgs&);

// A unit of the latent's gradient from the weights that the forward pass reads, one panel of them:
//   sums[row][:] = sum over taps and the panel's channels c of source[tap.source][row][c] * weights[tap.matrix][:][c]
struct LatentArgs {
  const char* source;                    // the gradient's units, from the panel's first channel on
  int64_t position_stride, unit_stride;  // bytes
  const Tap* taps;
  int tap_count;
  int steps;            // dwords of the latent's channels in this unit: its last one may be short
  const char* weights;  // of the unit's first step
  int64_t matrix_stride;
  float* sums;  // a float32 unit of each row; channels beyond the latent's are zeros
};
using LatentKernel = void (*)(const LatentArgs&);

// Sums that rest in float32 units, to be finished: channels [channel_begin, channel_end), multiples of a vector's lanes,
// of the places [place_begin, place_end).
struct FinishArgs {
  const float* sums;
  char* stored;      // forward: gets the activations; backward: the stored output that tells the derivative
  char* delta;       // backward: gets the gradients
  const int* order;  // backward: the place in `delta` of each place's gradient
  int64_t places;    // of a unit
  Activation activation;
  float slope;
  int channel_begin, channel_end;
  int64_t place_begin, place_end;
};
using FinishKernel = void (*)(const FinishArgs&);

// A layer's affine map, forward: stored[o] = activation(scale * source[from[o]] + shift), units [unit_begin, unit_end).
// scale and shift are [unit][scale_positions][16] with scale_positions 1 or `positions`.
struct MapArgs {
  const char* source;
  int source_positions;
  char* stored;
  int positions;
  int rows;
  const int* from;  // [positions]
  const float *scale, *shift;
  int scale_positions;
  int unit_begin, unit_end;
  Activation activation;
  float slope;
};

// A gradient that passes through a layer without a matrix. It ends like that of a layer with one: kGradient writes it
// over the stored output of the layer below, in the storage type, kRaw to float32 units.
struct PassedGradient {
  const char* delta;  // the gradient of the layer's output
  int positions;      // of the output
  char* destination;
  Epilogue epilogue;
  int source_positions;  // of the layer's input
  int rows;
  Activation activation;
  float slope;
};

// The affine map's: gradient[i] = sum over o with from[o] == i of scale * delta[o], units [unit_begin, unit_end).
struct MapGradientArgs {
  PassedGradient passed;
  const int *to_begin, *to;  // input position i has the outputs to[to_begin[i]] .. to[to_begin[i + 1] - 1]
  const float* scale;
  int scale_positions;
  int unit_begin, unit_end;
};

// The same elements in (channel, y, x) order under another shape; elements [begin, end) in that order.
struct ReorderArgs {
  const char* source;
  int source_positions;
  char* stored;
  int positions;
  int rows;
  int64_t begin, end;
};
struct ReorderGradientArgs {
  PassedGradient passed;
  int64_t begin, end;
};

struct KernelTable {
  int lanes;                  // dwords of one vector; a panel is two of them
  int unit_channels;          // 16 or 32
  int max_rows[kTileWidths];  // of a tile of that width
  int64_t ahead_bytes;        // the row schedule fetches ahead in layers of so many bytes of weights
  int step_multiple;          // steps of a matrix are padded to a multiple of it, with weights of zero
  bool tails;                 // whether a panel may be one vector; else the last is padded to two
  bool twins;                 // whether a tile can be two positions, of half as many rows
  bool tile_registers;        // whether a tile's rows are computed at once
  int max_segments;           // of a tile of the tap schedule,
  int max_segment;            // positions of one of them,
  int max_positions;          // and of all
  GemmKernel gemm[kEpilogues][kTileWidths][kMaxTileRows + 1];
  GemmKernel gemm_twins[kEpilogues][kTileWidths][kMaxTileRows + 1];      // by the rows of each position
  TapKernel tap[kOnePanel + 1][kMaxTileSegments + 1][kMaxTileRows + 1];  // by width, segments, positions

  int max_latent_rows;
  LatentKernel latent[kOnePanel + 1][kMaxTileRows + 1];  // by width and rows; nullptr: there are none

  // Units below are float32 units (16 channels) unless they are said to be of the storage type.

  // latent [row][k] float32 -> units of the storage type, channels [16 * unit_begin, 16 * unit_end).
  void (*store_latent)(const float* latent, int k, int rows, int unit_begin, int unit_end, char* units);

  FinishKernel finish_forward;   // stored = activation(sums)
  FinishKernel finish_gradient;  // delta[order[p]] = sums[p] * activation'(stored[p])

  // Units of the storage type <-> float32 units, float32 units [unit_begin, unit_end).
  void (*expand)(const char* units, float* wide, int unit_begin, int unit_end, int64_t places);
  void (*narrow)(const float* wide, char* units, int unit_begin, int unit_end, int64_t places);

  void (*map_forward)(const MapArgs&);
  void (*map_backward)(const MapGradientArgs&);
  void (*reorder_forward)(const ReorderArgs&);
  void (*reorder_backward)(const ReorderGradientArgs&);

  // GFLOP of `rounds` register-only multiply-adds (the machine's limit when timed).
  double (*multiply_adds)(int64_t rounds);

  // Called by each thread when it is done: gives tile registers back. nullptr where there are none.
  void (*release)();
};

// The image side, always float32. A pixel is the sum of the elements of `columns` that its entries name.
struct PixelEntry {
  int32_t slot;  // of the columns' units, unit * positions + position: a row's is at float (slot * rows + row) * 16
  int32_t lane;
};
// Neighbouring lanes whose elements belong to neighbouring pixels; backward these get the pixels' gradients.
struct PixelRun {
  int32_t slot;
  int32_t lane;
  int32_t pixel;
  int32_t count;
};
struct ImageArgs {
  const float* columns;    // float32 units
  const int* entry_begin;  // per pixel
  const PixelEntry* entries;
  const float* bias;  // per pixel, or nullptr
  const float* target;
  float* image;      // [row][pixel_stride]: the activated output
  float* delta;      // [row][pixel_stride]: gradient of the error with respect to the last layer's sums
  int pixel_stride;  // multiple of 16; pixels beyond `pixels` are padding
  int pixels;
  int rows;
  int pixel_begin, pixel_end;  // pixel_begin a multiple of 16
  Activation activation;
  float slope;
};

// One momentum step of the rows' latents: velocity = momentum * velocity + gradient; latent -= rate * velocity; channels
// of the float32 units [unit_begin, unit_end).
struct UpdateArgs {
  float* latent;          // [row][k]
  float* velocity;        // [row][k]
  const float* gradient;  // float32 units
  int k;
  int rows;
  int unit_begin, unit_end;
  float rate, momentum;
};

struct ImageKernels {
  void (*forward)(const ImageArgs&);   // columns -> image
  void (*gradient)(const ImageArgs&);  // image, target -> delta
  // delta -> columns' gradient (float32 units of the columns' geometry), runs [begin, end).
  void (*scatter)(const float* delta, int pixel_stride, int rows, const PixelRun* begin, const PixelRun* end,
                  float* columns);
  float (*error)(const float* image, const float* target, int pixels);  // mean squared error of one row
  void (*update)(const UpdateArgs&);
};

struct InstructionSet {
  const char* name;
  const KernelTable* float32;
  const KernelTable* bfloat16;
  const ImageKernels* image;
};

}  // namespace defgan::cpu
