// The geometry of a plan: everything that follows from its layers' shapes alone and that the CPU and CUDA kernels must
// see alike. Each backend lays its own buffers and tables out of what is derived here, and nowhere else.
//
// Words. A position is a pixel of a feature map, y * width + x. A tap is one product that a destination position sums:
// which source position, by which matrix. A layer's matrices are numbered by its pairs of (vertical, horizontal) sets of
// kernel elements (Links). A phase is every n-th position in both dimensions, beginning at one offset: positions
// of one phase share their matrices but at borders. A column is one (output channel, matrix) pair of a last layer that is
// computed as one product with all of them at once.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace defgan {

enum class Direction { kForward, kBackward };

// One dimension of a layer's links: output `out` reads input `in` with the kernel elements of set `set`. A set holds one
// kernel element, or several whose weights are summed (nearest upsampling followed by a convolution). A Linear layer has
// a set of its own for every pair of an input and an output, numbered in * outputs + out.
struct Link {
  int in, out, set;
};
struct Links {
  std::vector<Link> links;             // ordered by (set, in, out)
  std::vector<std::vector<int>> sets;  // the kernel elements of each set
};

// The links of a layer that has a matrix, in both dimensions.
struct LayerLinks {
  Links vertical, horizontal;

  int matrices() const { return int(vertical.sets.size() * horizontal.sets.size()); }
  int matrix(const Link& y, const Link& x) const { return y.set * int(horizontal.sets.size()) + x.set; }
  // How many pairs of an input and an output position are linked.
  int64_t pairs() const { return int64_t(vertical.links.size()) * int64_t(horizontal.links.size()); }
};

LayerLinks links_of(const Layer& layer);

// Multiply-adds of one forward pass of one row, border taps counted exactly.
int64_t multiply_adds(const Layer& layer);
int64_t multiply_adds(const Plan& plan);

// Useful floating-point operations of one gradient step of one row: forward and data gradient.
inline int64_t flop_per_step(const Plan& plan) { return 4 * multiply_adds(plan); }

struct Tap {
  int32_t source;  // position
  int32_t matrix;
};

// The order in which the taps of one destination are summed: by the phase of the source, then as `within` says. A backend
// chooses it once, since the order decides the bits of every result.
struct TapOrder {
  enum class Within { kByMatrix, kBySource };
  Pair source_phases{1, 1};
  Within within = Within::kByMatrix;
};

// The phase of a position of a map so wide, numbered row by row.
inline int phase_of(int position, int width, const Pair& phases) {
  return position / width % phases.h * phases.w + position % width % phases.w;
}

// A list for each of many destinations, one behind the other: of destination d, items[begin[d]] to items[begin[d + 1]].
template <class Item>
struct Lists {
  std::vector<int> begin;
  std::vector<Item> items;

  int count(int d) const { return begin[size_t(d) + 1] - begin[size_t(d)]; }
};

// The taps of every destination position of the layer in one direction, in order of summation.
Lists<Tap> taps_of(const Layer& layer, const LayerLinks& links, Direction direction, const TapOrder& order);

// The phases of a layer's destination positions within which they share matrices, but at borders. A Linear layer has no
// two positions that do.
Pair phases_of(const Layer& layer, Direction direction);

// The positions of each phase that has any, row by row.
std::vector<std::vector<int>> positions_by_phase(const Shape& shape, const Pair& phases);

// Of a kMap layer: the input position that each output position reads, and for each input position its readers.
struct MapTable {
  std::vector<int> from;
  Lists<int> readers;
};
MapTable map_table_of(const Layer& layer);

// What the last layer leaves for the image: its output itself, or, where an image has few channels, one column for every
// (channel, matrix) pair at every input position. A pixel is the sum of its entries.
struct ImageEntry {
  int position;
  int channel;  // column c * matrices + matrix, or output channel c
};
struct ImageGeometry {
  bool columns = false;
  LayerLinks links;             // of the last layer, where it has a matrix
  int positions = 0;            // of what is left
  int channels = 0;             // at each of them
  Lists<ImageEntry> of_pixels;  // by pixel (channel, y, x), in order of summation
};

// Columns are chosen where they take fewer multiply-adds, counting channels in whole multiples of `channel_multiple`, as
// the backend computes them. A column belongs to one pixel at most, so that the pixel's gradient can be stored there.
// `order` is of the columns' positions.
ImageGeometry image_geometry_of(const Plan& plan, int channel_multiple, const TapOrder& order);

// Where the numbers of a layer's parameters lie, as elements of the tensors that the plan names.
class ParameterAddresses {
 public:
  // elements: of every parameter tensor. They tell whether a norm is per channel or per element.
  ParameterAddresses(const Layer& layer, const std::vector<int64_t>& elements);

  // The weight that the kernel elements (ky, kx) of a pair of sets apply from one channel to another is at
  // weight_of(ky, kx) + channel_in * step_in + channel_out * step_out.
  int64_t weight_of(int ky, int kx) const;
  int64_t step_in = 0, step_out = 0;

  // The one output position that kernel elements of a Linear layer belong to; 0 for all of a convolution, which are
  // applied at every position and so have no norm per element.
  int output_position_of(int ky, int kx) const;

  // The norm of an output channel is at norm_of(position, channel), with any position where it is per channel.
  bool norm_per_element = false;
  int norm_step() const { return norm_per_element ? positions_ : 1; }  // between channels
  int norm_of(int position, int channel) const { return channel * norm_step() + (norm_per_element ? position : 0); }

  // Whether a bias with the norm folded into it differs between positions, and where the given one's numbers are.
  bool bias_per_position = false;
  int bias_of(int position, int channel) const { return linear_ ? channel * positions_ + position : channel; }

 private:
  Shape in_, out_;
  int kernel_width_ = 0, positions_ = 1;
  bool linear_ = false;
};

}  // namespace defgan
