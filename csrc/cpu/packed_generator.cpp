#include "packed_generator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

namespace defgan::cpu {

namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A norm as one multiply-add: scale and shift of every number that its vectors have, empty where there is no norm.
struct Affine {
  std::vector<float> scale, shift;
  bool present() const { return !scale.empty(); }
};

// One layer and what packing needs of its parameters.
struct Source {
  const Layer& layer;
  const std::vector<Parameter>& parameters;
  ParameterAddresses addresses;
  Affine norm;

  const float* data(int parameter) const { return parameter < 0 ? nullptr : parameters[size_t(parameter)].data; }
};

std::vector<int64_t> elements_of(const std::vector<Parameter>& parameters) {
  std::vector<int64_t> elements;
  for (const Parameter& p : parameters) elements.push_back(p.elements);
  return elements;
}

Source source_of(const Layer& layer, const std::vector<Parameter>& parameters) {
  Source s{layer, parameters, ParameterAddresses(layer, elements_of(parameters)), {}};
  const Norm& norm = layer.norm;
  if (!norm.present()) return s;
  const float *mean = s.data(norm.mean), *var = s.data(norm.var);
  const float *weight = s.data(norm.weight), *bias = s.data(norm.bias);
  for (int64_t i = 0; i < parameters[size_t(norm.mean)].elements; ++i) {
    const double gamma = weight ? double(weight[i]) : 1.0, beta = bias ? double(bias[i]) : 0.0;
    const double scale = gamma / std::sqrt(double(var[i]) + norm.eps);
    s.norm.scale.push_back(float(scale));
    s.norm.shift.push_back(float(beta - double(mean[i]) * scale));
  }
  return s;
}

// The layer's matrices as [matrix][input channel][output channel], kernel elements of one set summed, norm folded.
struct Matrices {
  int count = 0, in = 0, out = 0;
  std::vector<float> values;
  const float* at(int matrix, int ci) const { return values.data() + (int64_t(matrix) * in + ci) * out; }
};

// Adds the kernel element (ky, kx) to input channels [c0, c1) of one matrix.
void add_kernel_element(const Source& s, int ky, int kx, int c0, int c1, float* matrix) {
  const ParameterAddresses& at = s.addresses;
  const float* weight = s.data(s.layer.weight) + at.weight_of(ky, kx);
  const int64_t channels = s.layer.out.c, step_out = at.step_out;
  for (int ci = c0; ci < c1; ++ci) {
    const float* from = weight + ci * at.step_in;
    float* row = matrix + ci * channels;
    if (!s.norm.present()) {
      for (int64_t co = 0; co < channels; ++co) row[co] += from[co * step_out];
    } else {
      const float* scale = s.norm.scale.data() + at.norm_of(at.output_position_of(ky, kx), 0);
      const int64_t step = at.norm_step();
      for (int64_t co = 0; co < channels; ++co) row[co] += from[co * step_out] * scale[co * step];
    }
  }
}

Matrices matrices_of(const Source& s, const LayerLinks& links) {
  Matrices m;
  m.count = links.matrices();
  m.in = s.layer.in.c;
  m.out = s.layer.out.c;
  m.values.assign(size_t(m.count) * size_t(m.in) * size_t(m.out), 0.0f);
  // Some input channels at a time: their weights stay in the cache while all matrices pick theirs.
  constexpr int kTogether = 16;
  for (int c0 = 0; c0 < m.in; c0 += kTogether) {
    float* matrix = m.values.data();
    for (const std::vector<int>& set_y : links.vertical.sets)
      for (const std::vector<int>& set_x : links.horizontal.sets) {
        for (const int ky : set_y)
          for (const int kx : set_x) add_kernel_element(s, ky, kx, c0, std::min(m.in, c0 + kTogether), matrix);
        matrix += size_t(m.in) * size_t(m.out);
      }
  }
  return m;
}

// The bias with the norm folded into it, [position or 1][output channels].
std::vector<float> bias_of(const Source& s) {
  const float* given = s.data(s.layer.bias);
  std::vector<float> bias;
  for (int p = 0; p < (s.addresses.bias_per_position ? s.layer.out.positions() : 1); ++p)
    for (int c = 0; c < s.layer.out.c; ++c) {
      float value = given ? given[s.addresses.bias_of(p, c)] : 0.0f;
      if (s.norm.present()) {
        const size_t at = size_t(s.addresses.norm_of(p, c));
        value = value * s.norm.scale[at] + s.norm.shift[at];
      }
      bias.push_back(value);
    }
  return bias;
}

// Splits links (ordered by set, then input) into runs of equal steps.
std::vector<Run> runs_of(const Links& links, Direction direction) {
  const bool backward = direction == Direction::kBackward;
  std::vector<Run> runs;
  for (const Link& link : links.links) {
    const int source = backward ? link.out : link.in, destination = backward ? link.in : link.out;
    if (!runs.empty() && runs.back().set == link.set) {
      Run& r = runs.back();
      const int ds = source - (r.source + (r.count - 1) * r.source_step);
      const int dd = destination - (r.destination + (r.count - 1) * r.destination_step);
      if (r.count == 1 && ds > 0 && dd > 0) {
        r.source_step = ds;
        r.destination_step = dd;
        r.count = 2;
        continue;
      }
      if (r.count > 1 && ds == r.source_step && dd == r.destination_step) {
        ++r.count;
        continue;
      }
    }
    runs.push_back({link.set, source, destination, 1, 1, 1});
  }
  return runs;
}

void set_channels(Gemm& g, const KernelTable* table, int source, int destination) {
  g.table = table;
  g.source_channels = source;
  g.destination_channels = destination;
  g.steps = round_up(table->unit_channels == 32 ? (source + 1) / 2 : source, table->step_multiple);
}

// The positions of a phase in their order, or, where kernels take two at once, pairs of those with the same matrices.
// These have the same bias, too: it differs between positions in a Linear layer only, where each has its own matrices.
std::vector<Stop> stops_of(const Gemm& g, const std::vector<int>& positions) {
  std::vector<Stop> stops;
  std::map<std::vector<int>, size_t> single;  // by matrices: the stop that has no twin yet
  for (const int p : positions) {
    if (g.table->twins) {
      std::vector<int> matrices;
      for (int t = g.taps.begin[size_t(p)]; t < g.taps.begin[size_t(p) + 1]; ++t)
        matrices.push_back(g.taps.items[size_t(t)].matrix);
      const auto [found, added] = single.emplace(std::move(matrices), stops.size());
      if (!added) {
        stops[found->second].twin = p;
        single.erase(found);
        continue;
      }
    }
    stops.push_back({p, -1, 0, 0});
  }
  return stops;
}

// Orders positions phase by phase. While one phase is computed the next one's matrices are fetched, or after the last
// phase those that the next panel begins with; a position's share of them is its share of the phase's taps.
void order_stops(Gemm& g, const std::vector<std::vector<int>>& phases) {
  std::vector<std::vector<int>> matrices;  // of each phase
  for (const std::vector<int>& positions : phases) {
    std::set<int> used;
    for (const int p : positions)
      for (int t = g.taps.begin[size_t(p)]; t < g.taps.begin[size_t(p) + 1]; ++t)
        used.insert(g.taps.items[size_t(t)].matrix);
    matrices.emplace_back(used.begin(), used.end());
  }
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    const bool last = phase + 1 == phases.size();
    const std::vector<int>& next = matrices[last ? 0 : phase + 1];
    const int64_t wanted = int64_t(next.size()) * g.steps;
    std::vector<Stop> stops = stops_of(g, phases[phase]);
    int64_t all = 0, done = 0;
    for (const Stop& stop : stops) all += g.taps.count(stop.position);
    for (Stop& stop : stops) {
      const int taps = g.taps.count(stop.position);
      if (taps > 0 && wanted > 0) {
        const int64_t from = wanted * done / all;
        const int matrix = next[size_t(from / g.steps)] + (last ? g.matrices : 0);
        stop.ahead_step = int64_t(matrix) * g.steps + from % g.steps;
        stop.ahead_rate = float(next.size()) / float(all);
      }
      g.order.push_back(stop);
      done += taps;
    }
  }
  g.paired = int(g.order.size()) * 4 < g.destination_positions * 3;
}

// The tap schedule, where the layer suits it: runs must read neighbours once positions are in phase order. A gradient's
// source can be stored in that order (the layer above writes it so); a forward pass's source is in natural order, which
// its other readers want.
std::optional<TapRuns> tap_runs_of(const Layer& l, const LayerLinks& links, Direction direction) {
  const bool backward = direction == Direction::kBackward;
  const Shape &source = backward ? l.out : l.in, &destination = backward ? l.in : l.out;
  if (l.kind == Kind::kLinear || destination.positions() < 4) return std::nullopt;
  TapRuns runs{runs_of(links.vertical, direction),
               runs_of(links.horizontal, direction),
               int(links.horizontal.sets.size()),
               source.w,
               destination.w,
               1};
  for (const Run& r : runs.horizontal)
    if (r.count > 1) runs.phases = std::max(runs.phases, r.source_step);
  bool suits = backward || runs.phases == 1;
  for (const Run& r : runs.horizontal) suits = suits && (r.count == 1 || r.source_step == runs.phases);
  // Matrices that visit one destination from two sources (possible for none of the supported kinds with runs
  // this regular) would be summed in another order than the taps; one run a set and dimension excludes it.
  for (const std::vector<Run>* list : {&runs.horizontal, &runs.vertical})
    for (size_t i = 1; i < list->size(); ++i) suits = suits && (*list)[i].set != (*list)[i - 1].set;
  if (!suits || runs.horizontal.empty()) return std::nullopt;
  return runs;
}

// What one direction of a layer computes: taps of every destination position, their order, the tap schedule.
void link(Gemm& g, const KernelTable* table, const Layer& l, const LayerLinks& links, Direction direction) {
  const bool backward = direction == Direction::kBackward;
  const Shape& source = backward ? l.out : l.in;
  const Shape& destination = backward ? l.in : l.out;
  g.source_positions = source.positions();
  g.destination_positions = destination.positions();
  set_channels(g, table, source.c, destination.c);
  g.matrices = links.matrices();
  // By matrix: the one order of summation that both schedules follow.
  g.taps = taps_of(l, links, direction, {});
  order_stops(g, positions_by_phase(destination, phases_of(l, direction)));
  g.tap_runs = tap_runs_of(l, links, direction);
}

// weight(matrix, source channel, destination channel)
template <class Weight>
void pack_weights(Gemm& g, const Weight& weight) {
  const bool pairs = g.table->unit_channels == 32;
  const int lanes = g.table->lanes, panel_channels = 2 * lanes;
  g.panels = g.destination_channels / panel_channels;
  const int rest = g.destination_channels % panel_channels;
  g.tail = g.table->tails && rest > 0 && rest <= lanes;
  if (rest > 0 && !g.tail) ++g.panels;
  g.matrix_stride = int64_t(g.steps) * panel_channels * 4;
  g.tail_matrix_stride = int64_t(g.steps) * lanes * 4;
  g.panel_stride = g.matrices * g.matrix_stride;
  g.weights = Buffer(size_t(g.panels * g.panel_stride + g.tail * g.matrices * g.tail_matrix_stride));
  for (int p = 0; p < g.panels + g.tail; ++p) {
    const int channels = p < g.panels ? panel_channels : lanes, first = p * panel_channels;
    const int count = std::min(channels, g.destination_channels - first);
    char* destination = g.weights.data() + p * g.panel_stride;
    for (int m = 0; m < g.matrices; ++m)
      for (int step = 0; step < g.steps; ++step, destination += channels * 4) {
        if (step * (pairs ? 2 : 1) >= g.source_channels) continue;  // padding
        if (!pairs) {
          float* d = reinterpret_cast<float*>(destination);
          for (int o = 0; o < count; ++o) d[o] = weight(m, step, first + o);
        } else {
          uint16_t* d = reinterpret_cast<uint16_t*>(destination);
          const bool second = 2 * step + 1 < g.source_channels;
          for (int o = 0; o < count; ++o) {
            d[2 * o] = to_bfloat16(weight(m, 2 * step, first + o));
            d[2 * o + 1] = second ? to_bfloat16(weight(m, 2 * step + 1, first + o)) : uint16_t(0);
          }
        }
      }
  }
}

// The weights of one direction, whose sources are a layer's inputs or its outputs.
void pack_direction(Gemm& g, const Matrices& m, Direction direction) {
  if (direction == Direction::kForward)
    pack_weights(g, [&m](int matrix, int ci, int co) { return m.at(matrix, ci)[co]; });
  else
    pack_weights(g, [&m](int matrix, int co, int ci) { return m.at(matrix, ci)[co]; });
}

// bias: [position or 1][destination channels].
void pack_bias(Gemm& g, const std::vector<float>& bias) {
  const int channels = g.destination_channels, padded = round_up(channels, 2 * g.table->lanes);
  const int positions = int(bias.size()) / channels;
  g.bias.assign(size_t(positions) * size_t(padded), 0.0f);
  for (int p = 0; p < positions; ++p)
    std::copy_n(bias.begin() + int64_t(p) * channels, channels, g.bias.begin() + int64_t(p) * padded);
  g.bias_position_stride = positions > 1 ? padded : 0;
}

void pack_map(PackedLayer& packed, const Source& source) {
  const Layer& l = packed.layer;
  Map& map = packed.map;
  map.table = map_table_of(l);
  map.scale_positions = source.addresses.norm_per_element ? l.out.positions() : 1;
  const int units = round_up(l.out.c, 32) / 16;  // whole units of either storage type
  map.scale.assign(size_t(units) * size_t(map.scale_positions) * 16, 1.0f);
  map.shift.assign(map.scale.size(), 0.0f);
  if (!source.norm.present()) return;
  for (int c = 0; c < l.out.c; ++c)
    for (int p = 0; p < map.scale_positions; ++p) {
      const size_t to = (size_t(c / 16) * size_t(map.scale_positions) + size_t(p)) * 16 + size_t(c % 16);
      const size_t from = size_t(source.addresses.norm_of(p, c));
      map.scale[to] = source.norm.scale[from];
      map.shift[to] = source.norm.shift[from];
    }
}

// Both directions of a last layer whose output is the image's sums.
void pack_last_by_taps(PackedLayer& last, const KernelTable* table, const Source& source, const LayerLinks& links) {
  const Matrices m = matrices_of(source, links);
  link(last.forward, table, last.layer, links, Direction::kForward);
  pack_direction(last.forward, m, Direction::kForward);
  pack_bias(last.forward, bias_of(source));
  link(last.backward, table, last.layer, links, Direction::kBackward);
  // The image's gradient is in natural order, so only a schedule that reads that will do.
  if (last.backward.tap_runs && last.backward.tap_runs->phases > 1) last.backward.tap_runs.reset();
  pack_direction(last.backward, m, Direction::kBackward);
}

// Both directions of a last layer that is computed as columns: every input position is a row of one matrix product, so
// there is one tap, from a position to itself.
void pack_last_by_columns(PackedLayer& last, const KernelTable* table, const Source& source,
                          const ImageGeometry& image) {
  const Matrices m = matrices_of(source, image.links);
  set_channels(last.forward, table, last.layer.in.c, image.channels);
  set_channels(last.backward, table, image.channels, last.layer.in.c);
  for (Gemm* g : {&last.forward, &last.backward}) {
    g->source_positions = g->destination_positions = 1;
    g->matrices = 1;
    g->taps = {{0, 1}, {{0, 0}}};
    order_stops(*g, {{0}});
  }
  const auto weight = [&m](int ci, int column) { return m.at(column % m.count, ci)[column / m.count]; };
  pack_weights(last.forward, [&](int, int ci, int column) { return weight(ci, column); });
  pack_weights(last.backward, [&](int, int column, int ci) { return weight(ci, column); });
}

// The bias of each pixel, which columns leave out: several of them are added up for one pixel.
std::vector<float> pixel_bias_of(const Source& source, int pixel_stride) {
  const Shape& out = source.layer.out;
  const std::vector<float> bias = bias_of(source);
  std::vector<float> of_pixels(size_t(pixel_stride), 0.0f);
  for (int c = 0; c < out.c; ++c)
    for (int p = 0; p < out.positions(); ++p)
      of_pixels[size_t(c) * size_t(out.positions()) + size_t(p)] =
          bias[size_t(source.addresses.bias_per_position ? p * out.c + c : c)];
  return of_pixels;
}

// Which lanes of which units each pixel reads, and the same by unit: runs of neighbouring lanes of neighbouring pixels.
void pack_entries(PackedGenerator& packed, const ImageGeometry& image) {
  packed.entry_begin = image.of_pixels.begin;
  for (const ImageEntry& e : image.of_pixels.items)
    packed.entries.push_back({e.channel / 16 * image.positions + e.position, e.channel % 16});

  std::vector<PixelRun> single;
  for (int pixel = 0; pixel < packed.pixels(); ++pixel)
    for (int i = packed.entry_begin[size_t(pixel)]; i < packed.entry_begin[size_t(pixel) + 1]; ++i)
      single.push_back({packed.entries[size_t(i)].slot, packed.entries[size_t(i)].lane, pixel, 1});
  std::sort(single.begin(), single.end(),
            [](const PixelRun& a, const PixelRun& b) { return a.slot != b.slot ? a.slot < b.slot : a.lane < b.lane; });
  for (const PixelRun& next : single) {
    PixelRun* before = packed.runs.empty() ? nullptr : &packed.runs.back();
    if (before && before->slot == next.slot && before->lane + before->count == next.lane &&
        before->pixel + before->count == next.pixel)
      ++before->count;
    else
      packed.runs.push_back(next);
  }
}

void pack_image(PackedGenerator& packed, PackedLayer& last, const Source& source) {
  const KernelTable* table = packed.set->float32;
  // Entries are summed by matrix, as a layer's taps are.
  const ImageGeometry image = image_geometry_of(packed.plan, table->lanes, {});
  packed.columns = image.columns;
  packed.image_positions = image.positions;
  packed.image_units = round_up(image.channels, 16) / 16;
  if (image.columns) {
    pack_last_by_columns(last, table, source, image);
    packed.pixel_bias = pixel_bias_of(source, packed.pixel_stride());
  } else if (last.layer.has_matrix()) {
    pack_last_by_taps(last, table, source, image.links);
  }
  pack_entries(packed, image);
}

// Whether the gradient of the one source position, the latent, is taken from these weights: where a panel has enough taps
// for its products to outweigh the sums over lanes in the end (a fully connected network's has one).
bool gives_latent_gradient(const Gemm& g) {
  return g.source_positions == 1 && g.taps.items.size() >= 8 && g.table->latent[kOnePanel][1];
}

// Both directions of a layer with a matrix that is not the last. The first one's forward weights may give the latent's
// gradient, too, and then need no others for it.
void pack_matrix(PackedLayer& packed, const KernelTable* table, const Source& source, bool first) {
  const Layer& l = packed.layer;
  const LayerLinks links = links_of(l);
  const Matrices m = matrices_of(source, links);
  Gemm& forward = packed.forward;
  link(forward, table, l, links, Direction::kForward);
  pack_direction(forward, m, Direction::kForward);
  pack_bias(forward, bias_of(source));
  if (first && gives_latent_gradient(forward)) {
    LatentGradient& gradient = forward.latent_gradient.emplace();
    for (int p = 0; p < forward.destination_positions; ++p)
      for (int t = forward.taps.begin[size_t(p)]; t < forward.taps.begin[size_t(p) + 1]; ++t)
        gradient.taps.push_back({p, forward.taps.items[size_t(t)].matrix});
  } else {
    link(packed.backward, table, l, links, Direction::kBackward);
    pack_direction(packed.backward, m, Direction::kBackward);
  }
}

// Where the gradient of each position of a map is kept for a reader that takes columns of x in so many phases.
std::vector<int> gradient_order_of(const Shape& shape, int phases) {
  std::vector<int> order;
  for (int y = 0; y < shape.h; ++y)
    for (int x = 0; x < shape.w; ++x) {
      int start = 0;  // of the phase: the number of positions in the phases before it
      for (int phase = 0; phase < x % phases; ++phase) start += (shape.w - phase + phases - 1) / phases;
      order.push_back(y * shape.w + start + x / phases);
    }
  return order;
}

std::shared_ptr<PackedGenerator> pack_all(const Plan& plan, const std::vector<Parameter>& parameters,
                                          const InstructionSet& set, Precision precision) {
  auto packed = std::make_shared<PackedGenerator>();
  packed->plan = plan;
  packed->precision = precision;
  packed->set = &set;
  const KernelTable* table = precision == Precision::kBfloat16 ? set.bfloat16 : set.float32;
  for (size_t n = 0; n < plan.layers.size(); ++n) {
    PackedLayer layer;
    layer.layer = plan.layers[n];
    const Layer& l = layer.layer;
    const Source source = source_of(l, parameters);
    layer.slope = l.activation == Activation::kRelu ? 0.0f : l.activation == Activation::kLeakyRelu ? l.slope : 1.0f;
    if (l.kind == Kind::kMap) pack_map(layer, source);
    if (n + 1 == plan.layers.size())
      pack_image(*packed, layer, source);
    else if (l.has_matrix())
      pack_matrix(layer, table, source, n == 0);
    layer.gradient_order = gradient_order_of(l.out, layer.backward.tap_runs ? layer.backward.tap_runs->phases : 1);
    packed->layers.push_back(std::move(layer));
  }
  return packed;
}

}  // namespace

size_t PackedGenerator::bytes() const {
  size_t total = exact ? exact->bytes() : 0;
  for (const PackedLayer& l : layers) total += l.forward.weights.size() + l.backward.weights.size();
  return total + entries.size() * sizeof(PixelEntry) + runs.size() * sizeof(PixelRun);
}

std::shared_ptr<const PackedGenerator> pack(const Plan& plan, const std::vector<Parameter>& parameters,
                                            const InstructionSet& set, Precision precision) {
  check_parameters(plan, elements_of(parameters));
  auto packed = pack_all(plan, parameters, set, precision);
  if (precision == Precision::kBfloat16) packed->exact = pack_all(plan, parameters, set, Precision::kFloat32);
  return packed;
}

}  // namespace defgan::cpu
