#include "geometry.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace defgan {
namespace {

// More columns than any image needs; keeps their number inside int.
constexpr double kMaxColumns = 1 << 20;

double round_up(double value, int multiple) { return double((int64_t(value) + multiple - 1) / multiple * multiple); }

// The links of one dimension; pick takes that dimension of a height and a width.
template <class Pick>
Links links_along(const Layer& layer, const Pick& pick) {
  const int in = pick(layer.in.h, layer.in.w), out = pick(layer.out.h, layer.out.w);
  const int kernel = pick(layer.kernel.h, layer.kernel.w), stride = pick(layer.stride.h, layer.stride.w);
  const int pad = pick(layer.pad.h, layer.pad.w), up = pick(layer.upsample.h, layer.upsample.w);
  Links result;
  if (layer.kind == Kind::kLinear) {
    for (int i = 0; i < in; ++i)
      for (int o = 0; o < out; ++o) {
        result.links.push_back({i, o, int(result.sets.size())});
        result.sets.push_back({i * out + o});
      }
    return result;
  }
  // All kernel elements that join one pair of positions are applied as one matrix, the sum of theirs.
  std::map<std::pair<int, int>, std::vector<int>> joining;
  if (layer.kind == Kind::kConvTranspose) {
    for (int i = 0; i < in; ++i)
      for (int k = 0; k < kernel; ++k) {
        const int o = stride * i + k - pad;
        if (o >= 0 && o < out) joining[{i, o}].push_back(k);
      }
  } else {
    for (int o = 0; o < out; ++o)
      for (int k = 0; k < kernel; ++k) {
        const int u = stride * o + k - pad;
        if (u >= 0 && u < in * up) joining[{u / up, o}].push_back(k);
      }
  }
  std::map<std::vector<int>, int> ids;
  for (const auto& entry : joining) ids.emplace(entry.second, 0);
  for (auto& id : ids) {
    id.second = int(result.sets.size());
    result.sets.push_back(id.first);
  }
  for (const auto& entry : joining) result.links.push_back({entry.first.first, entry.first.second, ids[entry.second]});
  std::stable_sort(result.links.begin(), result.links.end(),
                   [](const Link& a, const Link& b) { return a.set < b.set; });
  return result;
}

// Whether an input position gives the same matrix's product to several outputs (upsampling wider than the kernel).
bool shares_products(const Links& links) {
  for (size_t i = 1; i < links.links.size(); ++i)
    if (links.links[i].set == links.links[i - 1].set && links.links[i].in == links.links[i - 1].in) return true;
  return false;
}

bool columns_are_cheaper(const Layer& layer, const LayerLinks& links, int channel_multiple) {
  if (layer.kind == Kind::kLinear || shares_products(links.vertical) || shares_products(links.horizontal)) return false;
  const double columns = double(links.matrices()) * layer.out.c;
  if (columns > kMaxColumns) return false;
  return layer.in.positions() * round_up(columns, channel_multiple) <
         double(links.pairs()) * round_up(layer.out.c, channel_multiple);
}

// Turns the counts of destinations 0, 1, ..., each one place further on, into where their lists begin.
void sum_up(std::vector<int>& counts) {
  for (size_t d = 1; d < counts.size(); ++d) counts[d] += counts[d - 1];
}

}  // namespace

LayerLinks links_of(const Layer& layer) {
  return {links_along(layer, [](int h, int) { return h; }), links_along(layer, [](int, int w) { return w; })};
}

int64_t multiply_adds(const Layer& layer) {
  return layer.has_matrix() ? links_of(layer).pairs() * layer.in.c * layer.out.c : 0;
}

int64_t multiply_adds(const Plan& plan) {
  int64_t total = 0;
  for (const Layer& layer : plan.layers) total += multiply_adds(layer);
  return total;
}

Lists<Tap> taps_of(const Layer& layer, const LayerLinks& links, Direction direction, const TapOrder& order) {
  const bool backward = direction == Direction::kBackward;
  const Shape& from = backward ? layer.out : layer.in;
  const Shape& to = backward ? layer.in : layer.out;
  const auto each_tap = [&](const auto& use) {
    for (const Link& y : links.vertical.links)
      for (const Link& x : links.horizontal.links) {
        const int in = y.in * layer.in.w + x.in, out = y.out * layer.out.w + x.out;
        use(backward ? in : out, Tap{backward ? out : in, links.matrix(y, x)});
      }
  };
  Lists<Tap> taps;
  taps.begin.assign(size_t(to.positions()) + 1, 0);
  each_tap([&](int destination, const Tap&) { ++taps.begin[size_t(destination) + 1]; });
  sum_up(taps.begin);
  taps.items.resize(size_t(taps.begin.back()));
  std::vector<int> next = taps.begin;
  each_tap([&](int destination, const Tap& tap) { taps.items[size_t(next[size_t(destination)]++)] = tap; });

  const bool by_source = order.within == TapOrder::Within::kBySource;
  const auto rank = [&](const Tap& tap) {
    return std::make_tuple(phase_of(tap.source, from.w, order.source_phases), by_source ? tap.source : tap.matrix,
                           by_source ? tap.matrix : tap.source);
  };
  for (int d = 0; d < to.positions(); ++d)
    std::sort(taps.items.begin() + taps.begin[size_t(d)], taps.items.begin() + taps.begin[size_t(d) + 1],
              [&](const Tap& a, const Tap& b) { return rank(a) < rank(b); });
  return taps;
}

Pair phases_of(const Layer& layer, Direction direction) {
  const bool backward = direction == Direction::kBackward;
  if (layer.kind == Kind::kConvTranspose) return backward ? Pair{1, 1} : layer.stride;
  return backward ? layer.stride : layer.upsample;
}

std::vector<std::vector<int>> positions_by_phase(const Shape& shape, const Pair& phases) {
  std::vector<std::vector<int>> positions;
  for (int py = 0; py < std::min(phases.h, shape.h); ++py)
    for (int px = 0; px < std::min(phases.w, shape.w); ++px) {
      positions.emplace_back();
      for (int y = py; y < shape.h; y += phases.h)
        for (int x = px; x < shape.w; x += phases.w) positions.back().push_back(y * shape.w + x);
    }
  return positions;
}

MapTable map_table_of(const Layer& layer) {
  MapTable table;
  for (int y = 0; y < layer.out.h; ++y)
    for (int x = 0; x < layer.out.w; ++x)
      table.from.push_back((y + layer.pad.h) / layer.upsample.h * layer.in.w + (x + layer.pad.w) / layer.upsample.w);
  Lists<int>& readers = table.readers;
  readers.begin.assign(size_t(layer.in.positions()) + 1, 0);
  for (const int source : table.from) ++readers.begin[size_t(source) + 1];
  sum_up(readers.begin);
  readers.items.resize(table.from.size());
  std::vector<int> next = readers.begin;
  for (size_t o = 0; o < table.from.size(); ++o) readers.items[size_t(next[size_t(table.from[o])]++)] = int(o);
  return table;
}

ImageGeometry image_geometry_of(const Plan& plan, int channel_multiple, const TapOrder& order) {
  const Layer& layer = plan.layers.back();
  ImageGeometry image;
  if (layer.has_matrix()) {
    image.links = links_of(layer);
    image.columns = columns_are_cheaper(layer, image.links, channel_multiple);
  }
  const int positions = layer.out.positions(), matrices = image.links.matrices();
  image.positions = image.columns ? layer.in.positions() : positions;
  image.channels = image.columns ? layer.out.c * matrices : layer.out.c;

  Lists<Tap> taps;
  if (image.columns) taps = taps_of(layer, image.links, Direction::kForward, order);
  image.of_pixels.begin = {0};
  for (int c = 0; c < layer.out.c; ++c)
    for (int p = 0; p < positions; ++p) {
      std::vector<ImageEntry>& entries = image.of_pixels.items;
      if (image.columns) {
        for (int t = taps.begin[size_t(p)]; t < taps.begin[size_t(p) + 1]; ++t)
          entries.push_back({taps.items[size_t(t)].source, c * matrices + taps.items[size_t(t)].matrix});
      } else {
        entries.push_back({p, c});
      }
      image.of_pixels.begin.push_back(int(entries.size()));
    }
  return image;
}

ParameterAddresses::ParameterAddresses(const Layer& layer, const std::vector<int64_t>& elements)
    : in_(layer.in),
      out_(layer.out),
      kernel_width_(layer.kernel.w),
      positions_(layer.out.positions()),
      linear_(layer.kind == Kind::kLinear) {
  const int64_t kernel_elements = int64_t(layer.kernel.h) * layer.kernel.w;
  if (linear_) {  // [output element][input element]
    step_in = in_.positions();
    step_out = int64_t(positions_) * in_.elements();
  } else if (layer.kind == Kind::kConvTranspose) {  // [input channel][output channel][y][x]
    step_in = out_.c * kernel_elements;
    step_out = kernel_elements;
  } else if (layer.kind == Kind::kConv) {  // [output channel][input channel][y][x]
    step_in = kernel_elements;
    step_out = in_.c * kernel_elements;
  }
  norm_per_element = norm_is_per_element(layer, elements);
  bias_per_position = positions_ > 1 && ((linear_ && layer.bias >= 0) || norm_per_element);
}

int64_t ParameterAddresses::weight_of(int ky, int kx) const {
  if (!linear_) return int64_t(ky) * kernel_width_ + kx;
  // A Linear layer's links hold one kernel element each, input extent times output extent of them in each dimension.
  const int input_position = ky / out_.h * in_.w + kx / out_.w;
  return output_position_of(ky, kx) * in_.elements() + input_position;
}

int ParameterAddresses::output_position_of(int ky, int kx) const {
  return linear_ ? ky % out_.h * out_.w + kx % out_.w : 0;
}

}  // namespace defgan
