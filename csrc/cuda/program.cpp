// Makes a program of a plan: lays out a group's buffers, writes the stages with their index tables, and says what
// packing does for each of them.
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

// How a layer's products are taken: the taps of each destination are summed, or all its columns are one matrix.
enum class Form { kTaps, kColumns };

// Which of a layer's channels one side of its matrices has.
enum class Channels { kInput, kOutput };

class Builder {
 public:
  Builder(Program& program, const std::vector<int64_t>& elements) : p_(program), plan_(program.plan) {
    if (elements.size() > size_t(kMaxParameters))
      throw std::invalid_argument("plan: the CUDA kernels take at most " + std::to_string(kMaxParameters) +
                                  " parameters, got " + std::to_string(elements.size()));
    check_parameters(plan_, elements);
    for (const Layer& l : plan_.layers) addresses_.emplace_back(l, elements);
    image_ = image_geometry_of(plan_, kChunk, {column_phases(), TapOrder::Within::kBySource});
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
    const int64_t latent_bytes = int64_t(plan_.latent_size()) * kGroupRows * 4;
    p_.header.latent = reserve(latent_bytes);
    p_.header.velocity = reserve(latent_bytes);
    for (const Layer& l : plan_.layers) inputs_.push_back(reserve(block_bytes(l.in.positions(), chunks_of(l.in.c))));
    // The sums are dead once the image is made of them; the image's gradient is spread over their place.
    sums_ = reserve(int64_t(image_.positions) * padded(image_.channels) * kGroupRows * 4);
    p_.header.image = reserve(plan_.image.elements() * kGroupRows * 4);
    int most = chunks_of(image_.channels);
    for (const Layer& l : plan_.layers) most = std::max({most, chunks_of(l.in.c), chunks_of(l.out.c)});
    p_.header.zero_bytes = int32_t(block_bytes(1, most));
    p_.header.zero = reserve(p_.header.zero_bytes);
  }

  // --- tables -------------------------------------------------------------------------------------------

  int add_table(const std::vector<int32_t>& values) {
    if (p_.index.size() + values.size() > size_t(1) << 30)
      throw std::invalid_argument("plan: its index tables are too large for the CUDA kernels");
    const int at = int(p_.index.size());
    p_.index.insert(p_.index.end(), values.begin(), values.end());
    return at;
  }

  // Returns where a position of the stage's source lies, in the source tables' unit; kNone stands for the zeros.
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

  // The gradient of a layer's input is multiplied by the derivative of the activation that made that input; that of the
  // latent is a step.
  void end_backward(Stage& s, int n) const {
    s.backward = 1;
    s.epilogue = n == 0 ? Epilogue::kUpdate : Epilogue::kGradient;
    const Activation below = n == 0 ? Activation::kIdentity : plan_.layers[size_t(n - 1)].activation;
    s.activation = int32_t(below);
    s.slope = n == 0 ? 0.0f : slope_of(plan_.layers[size_t(n - 1)]);
  }

  // Sums are taken phase by phase of the positions that they come from, where a transposed convolution made these: a
  // kernel that holds one phase of an activation at a time (fused.h) can then keep the order.
  static Pair phases_made_by(const Layer& l) { return l.kind == Kind::kConvTranspose ? l.stride : Pair{1, 1}; }

  // Returns the phases of the columns' positions, which the layer before the last one made.
  Pair column_phases() const {
    const size_t count = plan_.layers.size();
    return count > 1 ? phases_made_by(plan_.layers[count - 2]) : Pair{1, 1};
  }

  void add_classes(Stage& s, const Layer& l, const LayerLinks& links, Direction direction) {
    const bool backward = direction == Direction::kBackward;
    const Shape& from = backward ? l.out : l.in;
    const Shape& to = backward ? l.in : l.out;
    const TapOrder order{backward ? phases_made_by(l) : Pair{1, 1}, TapOrder::Within::kByMatrix};
    const Lists<Tap> taps = taps_of(l, links, direction, order);
    // No two positions of a Linear layer share a matrix: each is a class of its own. Any partition would be correct.
    const Pair phases = l.kind == Kind::kLinear ? Pair{to.h, to.w} : phases_of(l, direction);

    std::vector<PositionClass> classes;
    for (const std::vector<int>& positions : positions_by_phase(to, phases)) {
      // A matrix may come several times, from several sources (upsampling backward): the n-th time is its own tap.
      using Key = std::tuple<int, int, int>;      // phase of the source, matrix, time
      std::map<Key, std::map<int, int>> sources;  // key -> position in the class -> source
      for (size_t i = 0; i < positions.size(); ++i) {
        int phase = kNone, matrix = kNone, time = 0;
        for (int t = taps.begin[size_t(positions[i])]; t < taps.begin[size_t(positions[i]) + 1]; ++t) {
          const Tap& tap = taps.items[size_t(t)];
          const int tap_phase = phase_of(tap.source, from.w, order.source_phases);
          time = tap_phase == phase && tap.matrix == matrix ? time + 1 : 0;
          phase = tap_phase;
          matrix = tap.matrix;
          sources[{phase, matrix, time}][int(i)] = tap.source;
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
    // This is a rule of the plan alone, since it decides the order of summation.
    if (s.destination_positions == 1 && most * s.source_chunks >= kMinChainChunks) s.chains = kChains;
    p_.classes.insert(p_.classes.end(), classes.begin(), classes.end());
  }

  // --- matrices -----------------------------------------------------------------------------------------

  const ParameterAddresses& addresses_of(const Layer& l) const { return addresses_[size_t(&l - plan_.layers.data())]; }

  // Which elements of its parameters each padded channel, or column, of one side of a matrix reads; kNone where none.
  struct Side {
    std::vector<int32_t> offset, norm, set;
  };

  Side side_of(const Layer& l, Channels which, int padded_channels, Form form, int matrices) const {
    const bool output = which == Channels::kOutput;
    const ParameterAddresses& at = addresses_of(l);
    Side side;
    for (std::vector<int32_t>* list : {&side.offset, &side.norm, &side.set})
      list->assign(size_t(padded_channels), kNone);
    const int channels = output ? l.out.c : l.in.c, copies = output && form == Form::kColumns ? matrices : 1;
    for (int i = 0; i < channels * copies; ++i) {
      const int channel = i / copies;
      side.offset[size_t(i)] = int32_t(channel * (output ? at.step_out : at.step_in));
      if (output) side.norm[size_t(i)] = at.norm_of(0, channel);
      if (output && form == Form::kColumns) side.set[size_t(i)] = i % copies;
    }
    return side;
  }

  void add_pack(Stage& s, const Layer& l, const LayerLinks& links, Direction direction, Form form) {
    const ParameterAddresses& at = addresses_of(l);
    const bool backward = direction == Direction::kBackward, columns = form == Form::kColumns;
    if (l.weight_elements() > int64_t(1) << 30)
      throw std::invalid_argument("plan: a weight has too many elements for the CUDA kernels");
    Pack pack{};
    pack.weight = l.weight;
    pack.mean = pack.var = pack.gamma = kNone;
    pack.matrices = columns ? 1 : links.matrices();
    pack.rows = s.destination_chunks * kChunk;
    pack.columns = s.source_chunks * kChunk;
    if (l.norm.present()) {
      pack.mean = l.norm.mean;
      pack.var = l.norm.var;
      pack.gamma = l.norm.weight;
      pack.eps = float(l.norm.eps);
    }
    const Side row_side =
        side_of(l, backward ? Channels::kInput : Channels::kOutput, pack.rows, form, links.matrices());
    const Side column_side =
        side_of(l, backward ? Channels::kOutput : Channels::kInput, pack.columns, form, links.matrices());
    pack.row_offset = add_table(row_side.offset);
    pack.row_norm = add_table(row_side.norm);
    pack.row_set = add_table(row_side.set);
    pack.column_offset = add_table(column_side.offset);
    pack.column_norm = add_table(column_side.norm);
    pack.column_set = add_table(column_side.set);
    pack.set_from = !columns ? SetFrom::kMatrix : backward ? SetFrom::kColumn : SetFrom::kRow;

    std::vector<int32_t> begin{0}, taps, set_norm;
    for (const std::vector<int>& set_y : links.vertical.sets)
      for (const std::vector<int>& set_x : links.horizontal.sets) {
        for (const int ky : set_y)
          for (const int kx : set_x) taps.push_back(int32_t(at.weight_of(ky, kx)));
        begin.push_back(int32_t(taps.size()));
        set_norm.push_back(at.norm_of(at.output_position_of(set_y.front(), set_x.front()), 0));
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

  int add_vector(const Layer& l, VectorKind kind, const std::vector<int32_t>& element, const std::vector<int32_t>& norm,
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
    v.kind = kind;
    v.eps = float(l.norm.eps);
    v.fill = fill;
    p_.vectors.push_back(v);
    p_.vector_floats += (v.count + 63) / 64 * 64;
    if (p_.vector_floats > (int64_t(1) << 30))
      throw std::invalid_argument("plan: too many biases for the CUDA kernels");
    return v.destination;
  }

  // Adds the bias of a layer with a matrix, [position or 1][padded channels].
  void add_bias(Stage& s, const Layer& l) {
    const ParameterAddresses& at = addresses_of(l);
    const int positions = at.bias_per_position ? l.out.positions() : 1, width = s.destination_chunks * kChunk;
    std::vector<int32_t> element(size_t(positions) * size_t(width), kNone), norm = element;
    for (int p = 0; p < positions; ++p)
      for (int c = 0; c < l.out.c; ++c) {
        const size_t to = size_t(p) * size_t(width) + size_t(c);
        element[to] = at.bias_of(p, c);
        norm[to] = at.norm_of(p, c);
      }
    s.bias = add_vector(l, VectorKind::kBias, element, norm, 0.0f);
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
    } else if (is_last(n) && image_.columns) {
      s.destination_positions = image_.positions;
      s.destination_chunks = chunks_of(image_.channels);
      add_one_tap(s);
      add_pack(s, l, image_.links, Direction::kForward, Form::kColumns);
    } else {
      const LayerLinks links = links_of(l);
      add_classes(s, l, links, Direction::kForward);
      add_pack(s, l, links, Direction::kForward, Form::kTaps);
      if (!is_last(n)) add_bias(s, l);
    }
    p_.stages.push_back(s);
  }

  // Multiplies every position by the one matrix, with itself as its source.
  void add_one_tap(Stage& s) {
    PositionClass c{};
    c.taps = 1;
    c.positions = image_.positions;
    std::vector<int32_t> all, sources;
    for (int i = 0; i < image_.positions; ++i) {
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
    s.index = add_table(map_table_of(l).from);
    add_map_scale(s, l);
  }

  void add_map_scale(Stage& s, const Layer& l) {
    if (!l.norm.present()) return;
    const ParameterAddresses& at = addresses_of(l);
    const int positions = at.norm_per_element ? l.out.positions() : 1, width = padded(l.out.c);
    std::vector<int32_t> element(size_t(positions) * size_t(width), kNone);
    for (int p = 0; p < positions; ++p)
      for (int c = 0; c < l.out.c; ++c) element[size_t(p) * size_t(width) + size_t(c)] = at.norm_of(p, c);
    s.scale = add_vector(l, VectorKind::kScale, element, element, 0.0f);
    s.shift = add_vector(l, VectorKind::kShift, element, element, 0.0f);
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

  // Adds the image, with the sums that make each pixel, and notes for the spreading which pixel each sum belongs to.
  void add_image() {
    const Layer& l = plan_.layers.back();
    const int width = padded(image_.channels), pixels = int(plan_.image.elements());
    pixel_of_.assign(size_t(image_.positions) * size_t(width), kNone);
    std::vector<int32_t> entries;
    for (int pixel = 0; pixel < pixels; ++pixel)
      for (int i = image_.of_pixels.begin[size_t(pixel)]; i < image_.of_pixels.begin[size_t(pixel) + 1]; ++i) {
        const ImageEntry& entry = image_.of_pixels.items[size_t(i)];
        const int at = entry.position * width + entry.channel;
        entries.push_back(at * kGroupRows);
        pixel_of_[size_t(at)] = pixel;
      }
    Stage s = stage(StageKind::kImage, sums_, p_.header.image, l.out, l.out);
    s.activation = int32_t(l.activation);
    s.slope = slope_of(l);
    s.index = add_table(entries);
    s.index_begin = add_table(image_.of_pixels.begin);
    s.pixels = pixels;
    if (l.has_matrix() && (l.bias >= 0 || l.norm.present())) {
      std::vector<int32_t> element, norm;
      for (int c = 0; c < l.out.c; ++c)
        for (int p = 0; p < l.out.positions(); ++p) {
          element.push_back(addresses_of(l).bias_of(p, c));
          norm.push_back(addresses_of(l).norm_of(p, c));
        }
      s.bias = add_vector(l, VectorKind::kBias, element, norm, 0.0f);
    }
    p_.stages.push_back(s);
  }

  void add_spread() {
    Stage s = stage(StageKind::kSpread, p_.header.image, sums_, plan_.image, plan_.image);
    s.destination_positions = image_.positions;
    s.destination_chunks = chunks_of(image_.channels);
    s.index = add_table(pixel_of_);
    p_.stages.push_back(s);
  }

  void add_backward(int n) {
    const Layer& l = plan_.layers[size_t(n)];
    Stage s = stage(StageKind::kGemm, output_of(n), inputs_[size_t(n)], l.out, l.in);
    end_backward(s, n);
    if (l.kind == Kind::kMap) {
      s.kind = StageKind::kMap;
      const Lists<int> readers = map_table_of(l).readers;
      s.index = add_table(readers.items);
      s.index_begin = add_table(readers.begin);
      add_map_scale(s, l);
    } else if (l.kind == Kind::kReorder) {
      add_reorder(s, l.out, l.in);
    } else if (is_last(n) && image_.columns) {
      s.source_chunks = chunks_of(image_.channels);
      s.source_channels = image_.channels;
      add_one_tap(s);
      add_pack(s, l, image_.links, Direction::kBackward, Form::kColumns);
    } else {
      const LayerLinks links = links_of(l);
      add_classes(s, l, links, Direction::kBackward);
      add_pack(s, l, links, Direction::kBackward, Form::kTaps);
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
  std::vector<ParameterAddresses> addresses_;  // layer by layer
  ImageGeometry image_;
  std::vector<int64_t> inputs_;
  int64_t sums_ = 0;
  std::vector<int32_t> pixel_of_;
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
