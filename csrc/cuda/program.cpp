#include "program.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>

namespace defgan::cuda {
namespace {

int chunks_of(int channels) { return (channels + kChunk - 1) / kChunk; }
int padded(int channels) { return chunks_of(channels) * kChunk; }

// A product of one source position and one matrix that a destination position sums.
struct Tap {
  int phase, matrix, source;
  bool operator<(const Tap& o) const { return std::tie(phase, matrix, source) < std::tie(o.phase, o.matrix, o.source); }
};

// How parameter elements map to the two sides of a layer's matrices.
struct Side {
  int channels = 0;
  std::vector<int32_t> offset, norm, set;  // of each padded channel (or column of the image's side)
};

class Builder {
 public:
  Builder(Program& program, const std::vector<int64_t>& elements) : p_(program), plan_(program.plan) {
    if (elements.size() > size_t(kMaxParameters))
      throw std::invalid_argument("plan: the CUDA kernels take at most " + std::to_string(kMaxParameters) +
                                  " parameters, got " + std::to_string(elements.size()));
    check_parameters(plan_, elements);
    for (const Layer& l : plan_.layers)
      per_element_.push_back(l.norm.present() && l.out.positions() > 1 &&
                             elements[size_t(l.norm.mean)] == l.out.elements());
  }

  void build() {
    lay_out_buffers();
    const int last = int(plan_.layers.size()) - 1;
    for (int n = 0; n <= last; ++n) add_forward(n);
    add_image();
    p_.header.forward_stages = int(p_.stages.size());
    add_spread();
    for (int n = last; n >= 0; --n) add_backward(n);
    p_.header.all_stages = int(p_.stages.size());
    p_.header.latent_size = plan_.latent_size();
    p_.header.latent_chunks = chunks_of(plan_.latent_size());
    p_.header.pixels = int(plan_.image.elements());
    p_.header.gradient_scale = 2.0f / float(plan_.image.elements());
    pack_tables();
  }

 private:
  // --- buffers ------------------------------------------------------------------------------------------

  int64_t reserve(int64_t bytes) {
    const int64_t at = p_.header.group_bytes;
    p_.header.group_bytes += (bytes + 255) / 256 * 256;
    return at;
  }

  int64_t block_bytes(int positions, int chunks) const {
    return int64_t(positions) * chunks * kChunk * kGroupRows * p_.element_bytes();
  }

  void lay_out_buffers() {
    const Layer& last = plan_.layers.back();
    if (last.has_matrix()) {
      ys_ = links_of(last, true);
      xs_ = links_of(last, false);
      columns_ = columns_are_cheaper(last);
    }
    places_ = columns_ ? last.in.positions() : last.out.positions();
    place_channels_ = columns_ ? int(ys_.sets.size() * xs_.sets.size()) * last.out.c : last.out.c;

    const int64_t latent_bytes = int64_t(plan_.latent_size()) * kGroupRows * 4;
    p_.header.latent = reserve(latent_bytes);
    p_.header.velocity = reserve(latent_bytes);
    for (const Layer& l : plan_.layers) inputs_.push_back(reserve(block_bytes(l.in.positions(), chunks_of(l.in.c))));
    // The sums are dead once the image is made of them; the image's gradient is spread over their place.
    sums_ = reserve(int64_t(places_) * padded(place_channels_) * kGroupRows * 4);
    p_.header.image = reserve(plan_.image.elements() * kGroupRows * 4);
    int most = chunks_of(place_channels_);
    for (const Layer& l : plan_.layers) most = std::max({most, chunks_of(l.in.c), chunks_of(l.out.c)});
    p_.header.zero_bytes = int32_t(block_bytes(1, most));
    p_.header.zero = reserve(p_.header.zero_bytes);
  }

  // Multiply-adds, padding counted, of the last layer as a sum of taps at each pixel against one product of every
  // input position with all (channel, tap) columns. A column belongs to one pixel at most, so that the pixel's
  // gradient can be stored there.
  bool columns_are_cheaper(const Layer& l) const {
    if (l.kind == Kind::kLinear || shares_products(ys_) || shares_products(xs_)) return false;
    const double links = double(ys_.links.size()) * double(xs_.links.size());
    const int64_t columns = int64_t(ys_.sets.size()) * int64_t(xs_.sets.size()) * l.out.c;
    if (columns > (1 << 20)) return false;
    return double(l.in.positions()) * padded(int(columns)) < links * padded(l.out.c);
  }

  // --- tables -------------------------------------------------------------------------------------------

  int add_table(const std::vector<int32_t>& values) {
    if (p_.index.size() + values.size() > size_t(1) << 30)
      throw std::invalid_argument("plan: its index tables are too large for the CUDA kernels");
    const int at = int(p_.index.size());
    p_.index.insert(p_.index.end(), values.begin(), values.end());
    return at;
  }

  // In the source tables' unit, of a position of the stage's source; kNone: of the zeros.
  int32_t source_of(const Stage& s, int position) const {
    const int64_t at = position == kNone ? p_.header.zero : s.source + block_bytes(position, s.source_chunks);
    if (at / kSourceUnit > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("plan: its activations are too large for the CUDA kernels");
    return int32_t(at / kSourceUnit);
  }

  Stage stage(StageKind kind, int64_t source, int64_t destination, const Shape& from, const Shape& to) const {
    Stage s{};
    s.kind = kind;
    s.source = source;
    s.destination = destination;
    s.destination_positions = to.positions();
    s.source_chunks = chunks_of(from.c);
    s.destination_chunks = chunks_of(to.c);
    s.source_channels = from.c;
    s.chains = 1;
    s.scale = s.shift = s.bias = s.index = s.index_begin = kNone;
    return s;
  }

  static float slope_of(const Layer& l) { return l.activation == Activation::kLeakyRelu ? l.slope : 0.0f; }

  // A gradient stage ends with what the layer below did to its output, or with the latent's step.
  void end_backward(Stage& s, int n) const {
    s.backward = 1;
    s.epilogue = n == 0 ? Epilogue::kUpdate : Epilogue::kGradient;
    const Activation below = n == 0 ? Activation::kIdentity : plan_.layers[size_t(n - 1)].activation;
    s.activation = int32_t(below);
    s.slope = n == 0 ? 0.0f : slope_of(plan_.layers[size_t(n - 1)]);
  }

  // Positions of one phase share their matrices but at borders. Any partition would be correct.
  static Pair phases(const Layer& l, bool backward) {
    if (l.kind == Kind::kLinear) {
      const Shape& to = backward ? l.in : l.out;
      return {to.h, to.w};
    }
    if (l.kind == Kind::kConvTranspose) return backward ? Pair{1, 1} : l.stride;
    return backward ? l.stride : l.upsample;
  }

  void add_classes(Stage& s, const Layer& l, const Links& ys, const Links& xs, bool backward) {
    const Shape& from = backward ? l.out : l.in;
    const Shape& to = backward ? l.in : l.out;
    // Gradients are summed phase by phase of the positions that they come from: a kernel that holds one phase of an
    // activation at a time (fused.h) can then keep the order.
    const Pair source_phases = backward && l.kind == Kind::kConvTranspose ? l.stride : Pair{1, 1};
    std::vector<std::vector<Tap>> taps(size_t(to.positions()));
    for (const Link& y : ys.links)
      for (const Link& x : xs.links) {
        const int in = y.in * l.in.w + x.in, out = y.out * l.out.w + x.out;
        const int source = backward ? out : in;
        const int phase = source / from.w % source_phases.h * source_phases.w + source % from.w % source_phases.w;
        taps[size_t(backward ? in : out)].push_back({phase, y.set * int(xs.sets.size()) + x.set, source});
      }
    const Pair phase = phases(l, backward);
    std::map<int, std::vector<int>> members;
    for (int d = 0; d < to.positions(); ++d) members[d / to.w % phase.h * phase.w + d % to.w % phase.w].push_back(d);

    std::vector<PositionClass> classes;
    for (const auto& entry : members) {
      const std::vector<int>& positions = entry.second;
      // A matrix may come several times, from several sources (upsampling backward): the n-th time is its own tap.
      using Key = std::tuple<int, int, int>;
      std::map<Key, std::map<int, int>> sources;  // key -> position in the class -> source
      for (size_t i = 0; i < positions.size(); ++i) {
        std::vector<Tap>& own = taps[size_t(positions[i])];
        std::sort(own.begin(), own.end());
        int times = 0;
        for (size_t t = 0; t < own.size(); ++t) {
          times = t > 0 && own[t].phase == own[t - 1].phase && own[t].matrix == own[t - 1].matrix ? times + 1 : 0;
          sources[{own[t].phase, own[t].matrix, times}][int(i)] = own[t].source;
        }
      }
      std::vector<int32_t> matrix, source;
      for (const auto& tap : sources) {
        matrix.push_back(std::get<1>(tap.first));
        std::vector<int32_t> line(positions.size(), source_of(s, kNone));
        for (const auto& one : tap.second) line[size_t(one.first)] = source_of(s, one.second);
        source.insert(source.end(), line.begin(), line.end());
      }
      PositionClass c{};
      c.taps = int(matrix.size());
      c.positions = int(positions.size());
      c.matrix = add_table(matrix);
      c.source = add_table(source);
      c.position = add_table(std::vector<int32_t>(positions.begin(), positions.end()));
      classes.push_back(c);
    }
    // Long classes first, so that the short ones fill the gaps at the end of a stage.
    std::stable_sort(classes.begin(), classes.end(),
                     [](const PositionClass& a, const PositionClass& b) { return a.taps > b.taps; });
    s.classes = int(p_.classes.size());
    s.class_count = int(classes.size());
    int most = 0;
    for (const PositionClass& c : classes) most = std::max(most, c.taps);
    // A rule of the plan alone, since it decides the order of summation.
    if (s.destination_positions == 1 && most * s.source_chunks >= kMinChainChunks) s.chains = kChains;
    p_.classes.insert(p_.classes.end(), classes.begin(), classes.end());
  }

  // --- matrices -----------------------------------------------------------------------------------------

  struct Steps {
    int64_t in, out;  // elements between input and between output channels of the parameter
  };
  static Steps steps_of(const Layer& l) {
    const int64_t taps = int64_t(l.kernel.h) * l.kernel.w;
    if (l.kind == Kind::kConvTranspose) return {l.out.c * taps, taps};
    if (l.kind == Kind::kConv) return {taps, l.in.c * taps};
    return {l.in.positions(), int64_t(l.out.positions()) * l.in.elements()};
  }

  bool norm_is_per_element(const Layer& l) const { return per_element_[size_t(&l - plan_.layers.data())]; }

  void add_pack(Stage& s, const Layer& l, const Links& ys, const Links& xs, bool backward, bool columns) {
    const int sets = int(ys.sets.size() * xs.sets.size());
    const Steps steps = steps_of(l);
    if (double(l.kind == Kind::kLinear ? double(l.in.elements()) * double(l.out.elements())
                                       : double(l.kernel.h) * l.kernel.w * l.in.c * l.out.c) > double(1 << 30))
      throw std::invalid_argument("plan: a weight has too many elements for the CUDA kernels");
    Pack pack{};
    pack.weight = l.weight;
    pack.mean = pack.var = pack.gamma = kNone;
    pack.matrices = columns ? 1 : sets;
    pack.rows = s.destination_chunks * kChunk;
    pack.columns = s.source_chunks * kChunk;
    if (l.norm.present()) {
      pack.mean = l.norm.mean;
      pack.var = l.norm.var;
      pack.gamma = l.norm.weight;
      pack.eps = float(l.norm.eps);
    }
    const int norm_step = norm_is_per_element(l) ? l.out.positions() : 1;
    const auto side = [&](bool output, int padded_channels, std::vector<int32_t>& offset, std::vector<int32_t>& norm,
                          std::vector<int32_t>& set) {
      offset.assign(size_t(padded_channels), kNone);
      norm.assign(size_t(padded_channels), kNone);
      set.assign(size_t(padded_channels), kNone);
      const int channels = output ? l.out.c : l.in.c, copies = output && columns ? sets : 1;
      for (int i = 0; i < channels * copies; ++i) {
        const int channel = i / copies;
        offset[size_t(i)] = int32_t(channel * (output ? steps.out : steps.in));
        if (output) norm[size_t(i)] = channel * norm_step;
        if (output && columns) set[size_t(i)] = i % copies;
      }
    };
    std::vector<int32_t> offset, norm, set;
    side(!backward, pack.rows, offset, norm, set);
    pack.row_offset = add_table(offset);
    pack.row_norm = add_table(norm);
    pack.row_set = add_table(set);
    side(backward, pack.columns, offset, norm, set);
    pack.column_offset = add_table(offset);
    pack.column_norm = add_table(norm);
    pack.column_set = add_table(set);
    pack.set_of = !columns ? 0 : backward ? 2 : 1;

    std::vector<int32_t> begin{0}, taps, set_norm;
    for (const auto& ty : ys.sets)
      for (const auto& tx : xs.sets) {
        int32_t norm_at = 0;
        for (const int ky : ty)
          for (const int kx : tx) {
            if (l.kind != Kind::kLinear) {
              taps.push_back(ky * l.kernel.w + kx);
              continue;
            }
            const int iy = ky / l.out.h, oy = ky % l.out.h, ix = kx / l.out.w, ox = kx % l.out.w;
            const int out = oy * l.out.w + ox;
            taps.push_back(int32_t(out * l.in.elements() + iy * l.in.w + ix));
            if (norm_step > 1) norm_at = out;
          }
        begin.push_back(int32_t(taps.size()));
        set_norm.push_back(norm_at);
      }
    pack.set_begin = add_table(begin);
    pack.set_taps = add_table(taps);
    pack.set_norm = add_table(set_norm);
    pack.elements = int64_t(pack.matrices) * pack.rows * pack.columns;
    if (pack.elements > int64_t(1) << 33 || int64_t(pack.rows) * pack.columns * 4 > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("plan: a weight has too many elements for the CUDA kernels");
    pack.weights = p_.weight_bytes;
    s.weights = pack.weights;
    p_.weight_bytes += (pack.elements * p_.element_bytes() + 255) / 256 * 256;
    p_.packs.push_back(pack);
  }

  // --- packed vectors -------------------------------------------------------------------------------------

  int add_vector(const Layer& l, int what, const std::vector<int32_t>& element, const std::vector<int32_t>& norm,
                 float fill) {
    PackVector v{};
    v.destination = int32_t(p_.vector_floats);
    v.count = int32_t(element.size());
    v.element = add_table(element);
    v.norm = add_table(norm);
    v.bias = l.bias;
    v.mean = l.norm.mean;
    v.var = l.norm.var;
    v.gamma = l.norm.weight;
    v.beta = l.norm.bias;
    v.what = what;
    v.eps = float(l.norm.eps);
    v.fill = fill;
    p_.vectors.push_back(v);
    p_.vector_floats += (v.count + 63) / 64 * 64;
    if (p_.vector_floats > (int64_t(1) << 30))
      throw std::invalid_argument("plan: too many biases for the CUDA kernels");
    return v.destination;
  }

  // Bias of a layer with a matrix, [position or 1][padded channels].
  void add_bias(Stage& s, const Layer& l) {
    const bool norm_per_element = norm_is_per_element(l);
    const int positions = (l.kind == Kind::kLinear && l.bias >= 0) || norm_per_element ? l.out.positions() : 1;
    const int width = s.destination_chunks * kChunk;
    std::vector<int32_t> element(size_t(positions) * size_t(width), kNone), norm = element;
    for (int p = 0; p < positions; ++p)
      for (int c = 0; c < l.out.c; ++c) {
        const size_t at = size_t(p) * size_t(width) + size_t(c);
        element[at] = l.kind == Kind::kLinear ? c * l.out.positions() + p : c;
        norm[at] = norm_per_element ? c * l.out.positions() + p : c;
      }
    s.bias = add_vector(l, 0, element, norm, 0.0f);
    s.bias_stride = positions > 1 ? width : 0;
  }

  // --- stages -------------------------------------------------------------------------------------------

  bool is_last(int n) const { return n + 1 == int(plan_.layers.size()); }
  int64_t output_of(int n) const { return is_last(n) ? sums_ : inputs_[size_t(n + 1)]; }

  void add_forward(int n) {
    const Layer& l = plan_.layers[size_t(n)];
    Stage s = stage(StageKind::kGemm, inputs_[size_t(n)], output_of(n), l.in, l.out);
    s.epilogue = is_last(n) ? Epilogue::kSums : Epilogue::kActivate;
    s.activation = int32_t(l.activation);
    s.slope = slope_of(l);
    if (!l.has_matrix()) {
      if (l.kind == Kind::kMap)
        add_map_forward(s, l);
      else
        add_reorder(s, l.in, l.out);
    } else if (is_last(n) && columns_) {
      s.destination_positions = places_;
      s.destination_chunks = chunks_of(place_channels_);
      add_one_tap(s);
      add_pack(s, l, ys_, xs_, false, true);
    } else {
      const Links ys = links_of(l, true), xs = links_of(l, false);
      add_classes(s, l, ys, xs, false);
      add_pack(s, l, ys, xs, false, false);
      if (!is_last(n)) add_bias(s, l);
    }
    p_.stages.push_back(s);
  }

  // Every position by the one matrix, with itself as its source.
  void add_one_tap(Stage& s) {
    PositionClass c{};
    c.taps = 1;
    c.positions = places_;
    std::vector<int32_t> all, sources;
    for (int i = 0; i < places_; ++i) {
      all.push_back(i);
      sources.push_back(source_of(s, i));
    }
    c.matrix = add_table({0});
    c.source = add_table(sources);
    c.position = add_table(all);
    s.classes = int(p_.classes.size());
    s.class_count = 1;
    p_.classes.push_back(c);
  }

  void add_map_forward(Stage& s, const Layer& l) {
    s.kind = StageKind::kMap;
    std::vector<int32_t> from;
    for (int y = 0; y < l.out.h; ++y)
      for (int x = 0; x < l.out.w; ++x)
        from.push_back((y + l.pad.h) / l.upsample.h * l.in.w + (x + l.pad.w) / l.upsample.w);
    s.index = add_table(from);
    add_map_scale(s, l);
  }

  void add_map_scale(Stage& s, const Layer& l) {
    if (!l.norm.present()) return;
    const int positions = norm_is_per_element(l) ? l.out.positions() : 1, width = chunks_of(l.out.c) * kChunk;
    std::vector<int32_t> element(size_t(positions) * size_t(width), kNone);
    for (int p = 0; p < positions; ++p)
      for (int c = 0; c < l.out.c; ++c) element[size_t(p) * size_t(width) + size_t(c)] = c * positions + p;
    s.scale = add_vector(l, 1, element, element, 0.0f);
    s.shift = add_vector(l, 2, element, element, 0.0f);
    s.scale_stride = positions > 1 ? width : 0;
  }

  void add_reorder(Stage& s, const Shape& from, const Shape& to) {
    s.kind = StageKind::kReorder;
    const int width = chunks_of(to.c) * kChunk, from_width = chunks_of(from.c) * kChunk;
    std::vector<int32_t> index(size_t(to.positions()) * size_t(width), kNone);
    for (int c = 0; c < to.c; ++c)
      for (int p = 0; p < to.positions(); ++p) {
        const int element = c * to.positions() + p;
        const int channel = element / from.positions(), position = element % from.positions();
        index[size_t(p) * size_t(width) + size_t(c)] = position * from_width + channel;
      }
    s.index = add_table(index);
  }

  // Image and spread: which sums make a pixel, and which columns get its gradient.
  void add_image() {
    const Layer& l = plan_.layers.back();
    const int width = padded(place_channels_), positions = l.out.positions();
    std::vector<std::vector<std::pair<std::tuple<int, int, int, int>, int>>> pixels(size_t(plan_.image.elements()));
    pixel_of_.assign(size_t(places_) * size_t(width), kNone);
    const auto connect = [&](int pixel, int place, int channel, std::tuple<int, int, int, int> order) {
      pixels[size_t(pixel)].push_back({order, place * width + channel});
      pixel_of_[size_t(place) * size_t(width) + size_t(channel)] = pixel;
    };
    if (columns_) {
      const int sets = int(ys_.sets.size() * xs_.sets.size());
      // Phase by phase of the columns' positions, for the same reason as in add_classes.
      const size_t count = plan_.layers.size();
      const bool strided = count > 1 && plan_.layers[count - 2].kind == Kind::kConvTranspose;
      const Pair phase = strided ? plan_.layers[count - 2].stride : Pair{1, 1};
      for (const Link& y : ys_.links)
        for (const Link& x : xs_.links)
          for (int c = 0; c < l.out.c; ++c)
            connect(c * positions + y.out * l.out.w + x.out, y.in * l.in.w + x.in,
                    c * sets + y.set * int(xs_.sets.size()) + x.set, {y.in % phase.h, x.in % phase.w, y.in, x.in});
    } else {
      for (int c = 0; c < l.out.c; ++c)
        for (int p = 0; p < positions; ++p) connect(c * positions + p, p, c, {0, 0, 0, 0});
    }
    std::vector<int32_t> begin{0}, entries;
    for (auto& pixel : pixels) {
      std::sort(pixel.begin(), pixel.end());
      for (const auto& entry : pixel) entries.push_back(entry.second * kGroupRows);
      begin.push_back(int32_t(entries.size()));
    }
    Stage s = stage(StageKind::kImage, sums_, p_.header.image, l.out, l.out);
    s.activation = int32_t(l.activation);
    s.slope = slope_of(l);
    s.index = add_table(entries);
    s.index_begin = add_table(begin);
    s.pixels = int(plan_.image.elements());
    if (l.has_matrix() && (l.bias >= 0 || l.norm.present())) {
      const bool norm_per_element = norm_is_per_element(l);
      std::vector<int32_t> element, norm;
      for (int c = 0; c < l.out.c; ++c)
        for (int p = 0; p < positions; ++p) {
          element.push_back(l.kind == Kind::kLinear ? c * positions + p : c);
          norm.push_back(norm_per_element ? c * positions + p : c);
        }
      s.bias = add_vector(l, 0, element, norm, 0.0f);
    }
    p_.stages.push_back(s);
  }

  void add_spread() {
    Stage s = stage(StageKind::kSpread, p_.header.image, sums_, plan_.image, plan_.image);
    s.destination_positions = places_;
    s.destination_chunks = chunks_of(place_channels_);
    s.index = add_table(pixel_of_);
    p_.stages.push_back(s);
  }

  void add_backward(int n) {
    const Layer& l = plan_.layers[size_t(n)];
    Stage s = stage(StageKind::kGemm, output_of(n), inputs_[size_t(n)], l.out, l.in);
    end_backward(s, n);
    if (l.kind == Kind::kMap) {
      s.kind = StageKind::kMap;
      std::vector<int32_t> begin(size_t(l.in.positions()) + 1, 0), to;
      std::vector<std::vector<int32_t>> readers(static_cast<size_t>(l.in.positions()));
      for (int y = 0; y < l.out.h; ++y)
        for (int x = 0; x < l.out.w; ++x)
          readers[size_t((y + l.pad.h) / l.upsample.h * l.in.w + (x + l.pad.w) / l.upsample.w)].push_back(y * l.out.w +
                                                                                                          x);
      for (size_t i = 0; i < readers.size(); ++i) {
        to.insert(to.end(), readers[i].begin(), readers[i].end());
        begin[i + 1] = int32_t(to.size());
      }
      s.index = add_table(to);
      s.index_begin = add_table(begin);
      add_map_scale(s, l);
    } else if (l.kind == Kind::kReorder) {
      add_reorder(s, l.out, l.in);
    } else if (is_last(n) && columns_) {
      s.source_chunks = chunks_of(place_channels_);
      s.source_channels = place_channels_;
      add_one_tap(s);
      add_pack(s, l, ys_, xs_, true, true);
    } else {
      const Links ys = links_of(l, true), xs = links_of(l, false);
      add_classes(s, l, ys, xs, true);
      add_pack(s, l, ys, xs, true, false);
    }
    p_.stages.push_back(s);
  }

  void pack_tables() {
    std::vector<char>& blob = p_.tables;
    blob.resize(sizeof(Header));
    const auto append = [&blob](const void* data, size_t bytes) {
      const int64_t at = int64_t((blob.size() + 255) / 256 * 256);
      blob.resize(size_t(at) + bytes);
      if (bytes) std::memcpy(blob.data() + at, data, bytes);
      return at;
    };
    Header& h = p_.header;
    std::vector<StageRecord> records;
    for (const Stage& s : p_.stages) {
      StageRecord record{};
      record.stage = s;
      if (s.kind == StageKind::kGemm)
        std::copy_n(p_.classes.begin() + s.classes, std::min(s.class_count, kStagedClasses), record.classes);
      records.push_back(record);
    }
    h.stages = append(records.data(), records.size() * sizeof(StageRecord));
    h.packs = append(p_.packs.data(), p_.packs.size() * sizeof(Pack));
    h.vectors = append(p_.vectors.data(), p_.vectors.size() * sizeof(PackVector));
    h.classes = append(p_.classes.data(), p_.classes.size() * sizeof(PositionClass));
    h.index = append(p_.index.data(), p_.index.size() * 4);
    h.pack_count = int(p_.packs.size());
    h.vector_count = int(p_.vectors.size());
    std::memcpy(blob.data(), &h, sizeof(Header));
  }

  Program& p_;
  const Plan& plan_;
  Links ys_, xs_;  // of the last layer
  bool columns_ = false;
  int places_ = 0, place_channels_ = 0;
  std::vector<int64_t> inputs_;
  int64_t sums_ = 0;
  std::vector<int32_t> pixel_of_;
  std::vector<bool> per_element_;
};

}  // namespace

Program::Program(const Plan& given, const std::vector<int64_t>& elements, Precision wanted)
    : plan(given), precision(wanted) {
  Builder(*this, elements).build();
  if (precision == Precision::kFloat32) return;
  exact = std::make_shared<const Program>(plan, elements, Precision::kFloat32);
  tables.resize((tables.size() + 255) / 256 * 256);
  tables.insert(tables.end(), exact->tables.begin(), exact->tables.end());
}

std::shared_ptr<const Program> make_program(const Plan& plan, const std::vector<int64_t>& elements,
                                            Precision precision) {
  return std::make_shared<const Program>(plan, elements, precision);
}

const std::vector<char>& tables_of(const Program& program) { return program.tables; }

}  // namespace defgan::cuda
