#include "packed_generator.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

namespace defgan::cpu {

Buffer::Buffer(size_t bytes) : size_(bytes) {
  // Large buffers (weights above all, streamed once a step) ask for huge pages: with small ones every page of the
  // stream would miss the TLB.
  constexpr size_t kHugePage = size_t(2) << 20;
  const size_t alignment = bytes >= kHugePage / 2 ? kHugePage : 64;
  const size_t rounded = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<char*>(std::aligned_alloc(alignment, rounded)));
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data_.get(), rounded, MADV_HUGEPAGE);  // a wish: failing changes nothing
#endif
  std::memset(data_.get(), 0, std::min(rounded, (bytes + 63) / 64 * 64));
}

namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// scale and shift of an affine normalisation, per channel or per element.
struct Affine {
  std::vector<float> scale, shift;
  bool per_element = false;
};

Affine affine_of(const Layer& layer, const std::vector<Parameter>& parameters) {
  Affine a;
  if (!layer.norm.present()) return a;
  const Parameter mean = parameters[size_t(layer.norm.mean)], var = parameters[size_t(layer.norm.var)];
  a.per_element = mean.elements == layer.out.elements() && layer.out.positions() > 1;
  for (int64_t i = 0; i < mean.elements; ++i) {
    const double gamma = layer.norm.weight < 0 ? 1.0 : double(parameters[size_t(layer.norm.weight)].data[i]);
    const double beta = layer.norm.bias < 0 ? 0.0 : double(parameters[size_t(layer.norm.bias)].data[i]);
    const double scale = gamma / std::sqrt(double(var.data[i]) + layer.norm.eps);
    a.scale.push_back(float(scale));
    a.shift.push_back(float(beta - double(mean.data[i]) * scale));
  }
  return a;
}

// The layer's matrices as [matrix][source channel][destination channel], taps of one set summed, norm folded.
struct Matrices {
  int count = 0, in = 0, out = 0;
  std::vector<float> values;
  const float* at(int matrix, int ci) const { return values.data() + (int64_t(matrix) * in + ci) * out; }
};

Matrices matrices_of(const Layer& l, const std::vector<Parameter>& parameters, const Links& ys, const Links& xs,
                     const Affine& affine) {
  const float* w = parameters[size_t(l.weight)].data;
  Matrices m;
  m.count = int(ys.sets.size() * xs.sets.size());
  m.in = l.in.c;
  m.out = l.out.c;
  m.values.assign(size_t(m.count) * size_t(m.in) * size_t(m.out), 0.0f);
  const int64_t taps = int64_t(l.kernel.h) * l.kernel.w;
  // Some source channels at a time: their weights stay in the cache while all taps pick theirs.
  constexpr int kTogether = 16;
  for (int c0 = 0; c0 < m.in; c0 += kTogether)
    for (size_t ty = 0; ty < ys.sets.size(); ++ty)
      for (size_t tx = 0; tx < xs.sets.size(); ++tx) {
        float* const matrix = m.values.data() + (ty * xs.sets.size() + tx) * size_t(m.in) * size_t(m.out);
        for (const int ky : ys.sets[ty])
          for (const int kx : xs.sets[tx]) {
            int64_t offset = 0, step_in = 0, step_out = 0, out_position = 0;
            if (l.kind == Kind::kConvTranspose) {  // [in][out][kernel]
              offset = int64_t(ky) * l.kernel.w + kx;
              step_in = l.out.c * taps;
              step_out = taps;
            } else if (l.kind == Kind::kConv) {  // [out][in][kernel]
              offset = int64_t(ky) * l.kernel.w + kx;
              step_in = taps;
              step_out = l.in.c * taps;
            } else {  // [out element][in element]
              const int iy = ky / l.out.h, oy = ky % l.out.h, ix = kx / l.out.w, ox = kx % l.out.w;
              out_position = int64_t(oy) * l.out.w + ox;
              offset = out_position * l.in.elements() + iy * l.in.w + ix;
              step_in = l.in.positions();
              step_out = int64_t(l.out.positions()) * l.in.elements();
            }
            for (int ci = c0; ci < std::min(m.in, c0 + kTogether); ++ci) {
              const float* source = w + offset + ci * step_in;
              float* row = matrix + int64_t(ci) * m.out;
              if (affine.scale.empty()) {
                for (int co = 0; co < m.out; ++co) row[co] += source[co * step_out];
              } else {
                const int64_t step = affine.per_element ? l.out.positions() : 1,
                              first = affine.per_element ? out_position : 0;
                for (int co = 0; co < m.out; ++co)
                  row[co] += source[co * step_out] * affine.scale[size_t(first + co * step)];
              }
            }
          }
      }
  return m;
}

// Bias after folding, [position or 1][out channels].
std::vector<float> bias_of(const Layer& l, const std::vector<Parameter>& parameters, const Affine& affine,
                           bool* per_position) {
  const float* given = l.bias < 0 ? nullptr : parameters[size_t(l.bias)].data;
  *per_position = l.out.positions() > 1 && ((l.kind == Kind::kLinear && given != nullptr) || affine.per_element);
  const int positions = *per_position ? l.out.positions() : 1;
  std::vector<float> bias(size_t(positions) * size_t(l.out.c));
  for (int p = 0; p < positions; ++p)
    for (int c = 0; c < l.out.c; ++c) {
      const size_t element = size_t(c) * size_t(positions) + size_t(p);
      const size_t given_at = l.kind == Kind::kLinear ? element : size_t(c),
                   affine_at = affine.per_element ? element : size_t(c);
      float value = given ? given[given_at] : 0.0f;
      if (!affine.scale.empty()) value = value * affine.scale[affine_at] + affine.shift[affine_at];
      bias[size_t(p) * size_t(l.out.c) + size_t(c)] = value;
    }
  return bias;
}

// Splits links (ordered by set, then input) into runs of equal steps.
std::vector<Run> runs_of(const Links& links, bool backward) {
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

void drop_tap_schedule(Gemm& g) {
  g.vertical.clear();
  g.horizontal.clear();
  g.phases = 1;
}

int tap_count(const Gemm& g, int position) { return g.tap_begin[size_t(position) + 1] - g.tap_begin[size_t(position)]; }

// The positions of a phase in their order, or, where kernels take two at once, pairs of those with the same matrices.
// These have the same bias, too: it differs between positions in a Linear layer only, where each has its own matrices.
std::vector<Place> places_of(const Gemm& g, const std::vector<int>& positions) {
  std::vector<Place> places;
  std::map<std::vector<int>, size_t> single;  // by matrices: the place that has no twin yet
  for (const int p : positions) {
    if (g.table->twins) {
      std::vector<int> matrices;
      for (int t = g.tap_begin[size_t(p)]; t < g.tap_begin[size_t(p) + 1]; ++t)
        matrices.push_back(g.taps[size_t(t)].matrix);
      const auto [found, added] = single.emplace(std::move(matrices), places.size());
      if (!added) {
        places[found->second].twin = p;
        single.erase(found);
        continue;
      }
    }
    places.push_back({p, -1, 0, 0});
  }
  return places;
}

// Orders positions phase by phase. While one phase is computed the next one's matrices are fetched, or after the last
// phase those that the next panel begins with; a position's share of them is its share of the phase's taps.
void order_places(Gemm& g, const std::vector<std::vector<int>>& phases) {
  std::vector<std::vector<int>> matrices;  // of each phase
  for (const std::vector<int>& positions : phases) {
    std::set<int> used;
    for (const int p : positions)
      for (int t = g.tap_begin[size_t(p)]; t < g.tap_begin[size_t(p) + 1]; ++t) used.insert(g.taps[size_t(t)].matrix);
    matrices.emplace_back(used.begin(), used.end());
  }
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    const bool last = phase + 1 == phases.size();
    const std::vector<int>& next = matrices[last ? 0 : phase + 1];
    const int64_t wanted = int64_t(next.size()) * g.steps;
    std::vector<Place> places = places_of(g, phases[phase]);
    int64_t all = 0, done = 0;
    for (const Place& place : places) all += tap_count(g, place.position);
    for (Place& place : places) {
      const int taps = tap_count(g, place.position);
      if (taps > 0 && wanted > 0) {
        const int64_t from = wanted * done / all;
        const int matrix = next[size_t(from / g.steps)] + (last ? g.matrices : 0);
        place.ahead_step = int64_t(matrix) * g.steps + from % g.steps;
        place.ahead_rate = float(next.size()) / float(all);
      }
      g.order.push_back(place);
      done += taps;
    }
  }
  g.paired = int(g.order.size()) * 4 < g.destination_positions * 3;
}

// Geometry of one direction: taps per destination, their order, the tap schedule.
void link(Gemm& g, const KernelTable* table, const Layer& l, const Links& ys, const Links& xs, bool backward) {
  const Shape& source = backward ? l.out : l.in;
  const Shape& destination = backward ? l.in : l.out;
  g.source_positions = source.positions();
  g.destination_positions = destination.positions();
  set_channels(g, table, source.c, destination.c);
  g.matrices = int(ys.sets.size() * xs.sets.size());
  g.horizontal_sets = int(xs.sets.size());
  g.source_width = source.w;
  g.destination_width = destination.w;

  std::vector<int> counts(size_t(g.destination_positions) + 1, 0);
  const auto each = [&](auto&& use) {
    for (const Link& y : ys.links)
      for (const Link& x : xs.links) {
        const int in = y.in * l.in.w + x.in, out = y.out * l.out.w + x.out;
        use(backward ? out : in, backward ? in : out, y.set * g.horizontal_sets + x.set);
      }
  };
  each([&](int, int d, int) { ++counts[size_t(d) + 1]; });
  for (size_t d = 1; d < counts.size(); ++d) counts[d] += counts[d - 1];
  g.tap_begin = counts;
  g.taps.resize(size_t(counts.back()));
  each([&](int s, int d, int matrix) { g.taps[size_t(counts[size_t(d)]++)] = {s, matrix}; });
  // Links run over vertical sets and within one over horizontal links, so sort each destination by matrix: the one
  // order of summation that both schedules follow.
  for (int d = 0; d < g.destination_positions; ++d)
    std::sort(
        g.taps.begin() + g.tap_begin[size_t(d)], g.taps.begin() + g.tap_begin[size_t(d) + 1],
        [](const Tap& a, const Tap& b) { return a.matrix != b.matrix ? a.matrix < b.matrix : a.source < b.source; });

  const int phase_h = backward ? 1 : std::max(1, l.kind == Kind::kConvTranspose ? l.stride.h : l.upsample.h);
  const int phase_w = backward ? 1 : std::max(1, l.kind == Kind::kConvTranspose ? l.stride.w : l.upsample.w);
  std::vector<std::vector<int>> phases;
  for (int py = 0; py < phase_h; ++py)
    for (int px = 0; px < phase_w; ++px) {
      phases.emplace_back();
      for (int y = py; y < destination.h; y += phase_h)
        for (int x = px; x < destination.w; x += phase_w) phases.back().push_back(y * destination.w + x);
    }
  order_places(g, phases);

  if (l.kind == Kind::kLinear) return;
  g.vertical = runs_of(ys, backward);
  g.horizontal = runs_of(xs, backward);
  // Runs must read neighbours once positions are in phase order. A gradient's source can be stored in that order
  // (the layer above writes it so); a forward pass's source is in natural order, shared with other readers.
  g.phases = 1;
  for (const Run& r : g.horizontal)
    if (r.count > 1) g.phases = std::max(g.phases, r.source_step);
  bool suits = true;
  for (const Run& r : g.horizontal) suits = suits && (r.count == 1 || r.source_step == g.phases);
  // Matrices that visit one destination from two sources (possible for none of the supported kinds with runs
  // this regular) would be summed in another order than the taps; one run a set and dimension excludes it.
  for (size_t i = 1; i < g.horizontal.size(); ++i) suits = suits && g.horizontal[i].set != g.horizontal[i - 1].set;
  for (size_t i = 1; i < g.vertical.size(); ++i) suits = suits && g.vertical[i].set != g.vertical[i - 1].set;
  if (!suits || (!backward && g.phases > 1) || destination.positions() < 4) drop_tap_schedule(g);
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

void pack_bias(Gemm& g, const std::vector<float>& bias, int positions) {
  const int channels = g.destination_channels, padded = round_up(channels, 2 * g.table->lanes);
  g.bias.assign(size_t(positions) * size_t(padded), 0.0f);
  for (int p = 0; p < positions; ++p)
    std::copy_n(bias.begin() + int64_t(p) * channels, channels, g.bias.begin() + int64_t(p) * padded);
  g.bias_position_stride = positions > 1 ? padded : 0;
}

void pack_map(PackedLayer& packed, const std::vector<Parameter>& parameters) {
  const Layer& l = packed.layer;
  Map& map = packed.map;
  for (int y = 0; y < l.out.h; ++y)
    for (int x = 0; x < l.out.w; ++x)
      map.from.push_back((y + l.pad.h) / l.upsample.h * l.in.w + (x + l.pad.w) / l.upsample.w);
  map.to_begin.assign(size_t(l.in.positions()) + 1, 0);
  for (int i : map.from) ++map.to_begin[size_t(i) + 1];
  for (size_t i = 1; i < map.to_begin.size(); ++i) map.to_begin[i] += map.to_begin[i - 1];
  std::vector<int> next = map.to_begin;
  map.to.resize(map.from.size());
  for (size_t o = 0; o < map.from.size(); ++o) map.to[size_t(next[size_t(map.from[o])]++)] = int(o);
  const Affine affine = affine_of(l, parameters);
  map.scale_positions = affine.per_element ? l.out.positions() : 1;
  const int units = round_up(l.out.c, 32) / 16;  // whole units of either storage type
  map.scale.assign(size_t(units) * size_t(map.scale_positions) * 16, 1.0f);
  map.shift.assign(map.scale.size(), 0.0f);
  if (affine.scale.empty()) return;
  for (int c = 0; c < l.out.c; ++c)
    for (int p = 0; p < map.scale_positions; ++p) {
      const size_t to = (size_t(c / 16) * size_t(map.scale_positions) + size_t(p)) * 16 + size_t(c % 16);
      const size_t from = size_t(c) * size_t(map.scale_positions) + size_t(p);
      map.scale[to] = affine.scale[from];
      map.shift[to] = affine.shift[from];
    }
}

// Lane-multiply-adds that the two forms of the last layer would take; the lesser wins. A column belongs to one
// pixel at most, so that the pixel's gradient can be stored there.
bool columns_are_cheaper(const Layer& l, const Links& ys, const Links& xs, int lanes) {
  if (l.kind == Kind::kLinear || shares_products(ys) || shares_products(xs)) return false;
  const double links = double(ys.links.size()) * double(xs.links.size());
  const double taps = double(ys.sets.size()) * double(xs.sets.size());
  const double gather = links * l.in.c * round_up(l.out.c, lanes);
  const double columns = double(l.in.positions()) * l.in.c * round_up(int(taps) * l.out.c, lanes);
  return columns < gather;
}

void pack_image(PackedGenerator& packed, PackedLayer& last, const std::vector<Parameter>& parameters) {
  const Layer& l = last.layer;
  const int positions = l.out.positions();
  const KernelTable* table = packed.set->float32;
  const Affine affine = l.has_matrix() ? affine_of(l, parameters) : Affine{};
  Links ys, xs;
  if (l.has_matrix()) {
    ys = links_of(l, true);
    xs = links_of(l, false);
    packed.columns = columns_are_cheaper(l, ys, xs, table->lanes);
  }
  bool per_position = false;
  const std::vector<float> bias = l.has_matrix() ? bias_of(l, parameters, affine, &per_position) : std::vector<float>();
  std::vector<std::vector<PixelEntry>> pixels(size_t(packed.pixels()));
  if (!packed.columns) {
    packed.image_places = positions;
    packed.image_units = round_up(l.out.c, 16) / 16;
    for (int c = 0; c < l.out.c; ++c)
      for (int p = 0; p < positions; ++p)
        pixels[size_t(c) * size_t(positions) + size_t(p)].push_back({(c / 16) * positions + p, c % 16});
    if (l.has_matrix()) {
      const Matrices m = matrices_of(l, parameters, ys, xs, affine);
      link(last.forward, table, l, ys, xs, false);
      pack_weights(last.forward, [&](int t, int ci, int co) { return m.at(t, ci)[co]; });
      pack_bias(last.forward, bias, per_position ? positions : 1);
      link(last.backward, table, l, ys, xs, true);
      // The image's gradient is in natural order, so only a schedule that reads that will do.
      if (last.backward.phases > 1) drop_tap_schedule(last.backward);
      pack_weights(last.backward, [&](int t, int ci, int co) { return m.at(t, co)[ci]; });
    }
  } else {
    // Every input position times every (tap, channel): one tap, all positions at once.
    const Matrices m = matrices_of(l, parameters, ys, xs, affine);
    const int columns = m.count * m.out, in_positions = l.in.positions();
    packed.image_places = in_positions;
    packed.image_units = round_up(columns, 16) / 16;
    for (const Link& y : ys.links)
      for (const Link& x : xs.links)
        for (int c = 0; c < l.out.c; ++c) {
          const int column = c * m.count + y.set * int(xs.sets.size()) + x.set;
          const int pixel = c * positions + y.out * l.out.w + x.out;
          pixels[size_t(pixel)].push_back({(column / 16) * in_positions + y.in * l.in.w + x.in, column % 16});
        }
    packed.pixel_bias.resize(size_t(packed.pixel_stride()), 0.0f);
    for (int c = 0; c < l.out.c; ++c)
      for (int p = 0; p < positions; ++p)
        packed.pixel_bias[size_t(c) * size_t(positions) + size_t(p)] =
            bias[(per_position ? size_t(p) * size_t(l.out.c) : 0) + size_t(c)];
    for (Gemm* g : {&last.forward, &last.backward}) {
      g->source_positions = g->destination_positions = 1;
      g->matrices = 1;
      g->tap_begin = {0, 1};
      g->taps = {{0, 0}};
    }
    set_channels(last.forward, table, l.in.c, columns);
    set_channels(last.backward, table, columns, l.in.c);
    for (Gemm* g : {&last.forward, &last.backward}) order_places(*g, {{0}});
    pack_weights(last.forward, [&](int, int ci, int column) { return m.at(column % m.count, ci)[column / m.count]; });
    pack_weights(last.backward, [&](int, int column, int ci) { return m.at(column % m.count, ci)[column / m.count]; });
  }
  packed.entry_begin = {0};
  for (const auto& list : pixels) {
    packed.entries.insert(packed.entries.end(), list.begin(), list.end());
    packed.entry_begin.push_back(int(packed.entries.size()));
  }

  for (size_t pixel = 0; pixel < pixels.size(); ++pixel)
    for (const PixelEntry& e : pixels[pixel]) packed.runs.push_back({e.place, e.lane, int(pixel), 1});
  std::sort(packed.runs.begin(), packed.runs.end(), [](const PixelRun& a, const PixelRun& b) {
    return a.place != b.place ? a.place < b.place : a.lane < b.lane;
  });
  size_t kept = 0;
  for (const PixelRun& run : packed.runs) {
    if (kept > 0) {
      PixelRun& before = packed.runs[kept - 1];
      if (before.place == run.place && before.lane + before.count == run.lane &&
          before.pixel + before.count == run.pixel) {
        ++before.count;
        continue;
      }
    }
    packed.runs[kept++] = run;
  }
  packed.runs.resize(kept);
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
    layer.slope = l.activation == Activation::kRelu ? 0.0f : l.activation == Activation::kLeakyRelu ? l.slope : 1.0f;
    if (l.kind == Kind::kMap) pack_map(layer, parameters);
    if (n + 1 == plan.layers.size()) {
      pack_image(*packed, layer, parameters);
    } else if (l.has_matrix()) {
      const Links ys = links_of(l, true), xs = links_of(l, false);
      const Affine affine = affine_of(l, parameters);
      const Matrices m = matrices_of(l, parameters, ys, xs, affine);
      link(layer.forward, table, l, ys, xs, false);
      pack_weights(layer.forward, [&](int t, int ci, int co) { return m.at(t, ci)[co]; });
      bool per_position = false;
      const std::vector<float> bias = bias_of(l, parameters, affine, &per_position);
      pack_bias(layer.forward, bias, per_position ? l.out.positions() : 1);
      if (n > 0 || !layer.forward.gives_latent_gradient()) {
        link(layer.backward, table, l, ys, xs, true);
        pack_weights(layer.backward, [&](int t, int ci, int co) { return m.at(t, co)[ci]; });
      } else {
        Gemm& g = layer.forward;
        for (int p = 0; p < g.destination_positions; ++p)
          for (int t = g.tap_begin[size_t(p)]; t < g.tap_begin[size_t(p) + 1]; ++t)
            g.latent_taps.push_back({p, g.taps[size_t(t)].matrix});
      }
    }
    const int phases = layer.backward.phases, width = l.out.w;
    for (int y = 0; y < l.out.h; ++y)
      for (int x = 0; x < width; ++x) {
        int start = 0;  // of the phase: the number of positions in the phases before it
        for (int phase = 0; phase < x % phases; ++phase) start += (width - phase + phases - 1) / phases;
        layer.gradient_order.push_back(y * width + start + x / phases);
      }
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
  std::vector<int64_t> elements;
  for (const Parameter& p : parameters) elements.push_back(p.elements);
  check_parameters(plan, elements);
  auto packed = pack_all(plan, parameters, set, precision);
  if (precision == Precision::kBfloat16) packed->exact = pack_all(plan, parameters, set, Precision::kFloat32);
  return packed;
}

}  // namespace defgan::cpu
