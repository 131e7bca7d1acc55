#include "passes.h"

#include <algorithm>
#include <cmath>

namespace defgan::cpu {
namespace {

// The kernels of all layers but the last.
const KernelTable& table_of(const PackedGenerator& g) { return *g.table(); }

// The last layer is always float32, so a generator of one layer reads its latent as float32.
const KernelTable& latent_table(const PackedGenerator& g) {
  return g.layers.size() == 1 ? *g.set->float32 : table_of(g);
}

// Whether the last layer reads float32 where the layers below store bfloat16.
bool widens_last_input(const PackedGenerator& g) { return g.layers.size() > 1 && g.precision == Precision::kBfloat16; }

}  // namespace

void Passes::store_latent(const PackedGenerator& g) {
  const Range units = latent_units();
  if (units.begin < units.end)
    latent_table(g).store_latent(w_.latent.floats(), g.plan.latent_size(), rows_, int(units.begin), int(units.end),
                                 w_.start_units.data());
  watch_.latent();
  meet();
}

void Passes::update(float rate, float momentum) {
  const Range units = latent_units();
  UpdateArgs args{};
  args.latent = w_.latent.floats();
  args.velocity = w_.velocity.floats();
  args.gradient = w_.gradient.floats();
  args.k = g_.plan.latent_size();
  args.rows = rows_;
  args.unit_begin = int(units.begin);
  args.unit_end = int(units.end);
  args.rate = rate;
  args.momentum = momentum;
  image_.update(args);
  watch_.latent();
}

// Sums in double neither overflow nor vanish, and the product of two floats is exact in it, so that a fused multiply-add
// changes nothing. Units are summed one by one, then over the row: it does not matter which member has which.
void Passes::scale_latent(float radius) {
  const int k = g_.plan.latent_size(), all_units = int(units_of(k, kUnitFloats));
  const Range units = latent_units();
  double* const squares = reinterpret_cast<double*>(w_.latent_squares.data());
  for (int row = 0; row < rows_; ++row)
    for (int u = int(units.begin); u < int(units.end); ++u) {
      double sum = 0;
      for (int c = u * kUnitFloats; c < std::min(k, (u + 1) * kUnitFloats); ++c) {
        const double z = double(w_.latent.floats()[int64_t(row) * k + c]);
        sum += z * z;
      }
      squares[row * all_units + u] = sum;
    }
  watch_.latent();
  meet();
  const int begin = int(units.begin) * kUnitFloats, end = std::min(k, int(units.end) * kUnitFloats);
  for (int row = 0; row < rows_; ++row) {
    double sum = 0;
    for (int u = 0; u < all_units; ++u) sum += squares[row * all_units + u];
    if (sum == 0) continue;
    const double scale = double(radius) / std::sqrt(sum);
    float* const latent = w_.latent.floats() + int64_t(row) * k;
    for (int c = begin; c < end; ++c) latent[c] = float(double(latent[c]) * scale);
  }
  watch_.latent();
}

// --- the image --------------------------------------------------------------------------------------------

ImageArgs Passes::image_args(const PackedGenerator& g) const {
  ImageArgs a{};
  a.columns = w_.columns.floats();
  a.delta = w_.image_delta.floats();
  a.entry_begin = g.entry_begin.data();
  a.entries = g.entries.data();
  a.bias = g.pixel_bias.empty() ? nullptr : g.pixel_bias.data();
  a.target = w_.target.floats();
  a.image = w_.image.floats();
  a.pixel_stride = g.pixel_stride();
  a.pixels = g.pixels();
  a.rows = rows_;
  const Range mine = me_.share(a.pixels, kUnitFloats);
  a.pixel_begin = int(mine.begin);
  a.pixel_end = int(mine.end);
  a.activation = g.plan.layers.back().activation;
  a.slope = g.layers.back().slope;
  return a;
}

void Passes::image_gradient() {
  const ImageArgs args = image_args(g_);
  if (args.pixel_begin < args.pixel_end) image_.gradient(args);
  watch_.image();
  meet();
  const Range runs = me_.share(int64_t(g_.runs.size()));
  image_.scatter(args.delta, args.pixel_stride, rows_, g_.runs.data() + runs.begin, g_.runs.data() + runs.end,
                 w_.image_gradient.floats());
  watch_.image();
  meet();
}

// --- forward ----------------------------------------------------------------------------------------------

void Passes::forward(const PackedGenerator& g) {
  const size_t last = g.layers.size() - 1;
  const char* source = w_.start_units.data();
  for (size_t n = 0; n < last; ++n) {
    forward_layer(g, n, source);
    watch_.forward(n);
    meet();
    source = w_.stored[n].data();
  }
  if (widens_last_input(g)) {
    const Layer& l = g.layers[last].layer;
    const Range units = me_.share(units_of(l.in.c, kUnitFloats));
    table_of(g).expand(source, w_.wide.floats(), int(units.begin), int(units.end), int64_t(l.in.positions()) * rows_);
    watch_.forward(last);
    meet();
    source = w_.wide.data();
  }
  last_layer_forward(g, source);
  watch_.forward(last);
  meet();
  const ImageArgs image = image_args(g);
  if (image.pixel_begin < image.pixel_end) image_.forward(image);
  watch_.image();
}

void Passes::forward_layer(const PackedGenerator& g, size_t n, const char* source) {
  const PackedLayer& p = g.layers[n];
  char* const stored = w_.stored[n].data();
  const Activation activation = p.layer.activation;
  if (p.layer.kind == Kind::kMap) return map_forward(table_of(g), p, source, stored, activation, p.slope);
  if (p.layer.kind == Kind::kReorder) return reorder_forward(table_of(g), p, source, stored);
  LayerWork work{source, rows_, stored, Epilogue::kActivate, activation, p.slope, {}};
  const bool by_taps = rows_ == 1 && p.forward.tap_runs;
  if (by_taps || is_transcendental(activation)) {
    work.epilogue = Epilogue::kRaw;
    work.destination = w_.scratch.data();
    work.finish.kernel = p.forward.table->finish_forward;
    FinishArgs& finish = work.finish.args;
    finish.sums = w_.scratch.floats();
    finish.stored = stored;
    finish.places = int64_t(p.layer.out.positions()) * rows_;
    finish.activation = activation;
    finish.slope = p.slope;
  }
  by_taps ? tap_schedule(p.forward, work, me_) : row_schedule(p.forward, work, me_);
}

void Passes::last_layer_forward(const PackedGenerator& g, const char* source) {
  const PackedLayer& p = g.layers.back();
  char* const columns = w_.columns.data();
  if (p.layer.kind == Kind::kMap) return map_forward(*g.set->float32, p, source, columns, Activation::kIdentity, 1.0f);
  if (p.layer.kind == Kind::kReorder) return reorder_forward(*g.set->float32, p, source, columns);
  // All places of the columns are rows of one position to the kernels.
  const int rows = g.columns ? g.image_positions * rows_ : rows_;
  row_schedule(p.forward, {source, rows, columns, Epilogue::kRaw, Activation::kIdentity, 1.0f, {}}, me_);
}

void Passes::map_forward(const KernelTable& table, const PackedLayer& p, const char* source, char* stored,
                         Activation activation, float slope) const {
  const Range units = me_.share(units_of(p.layer.out.c, kUnitFloats));
  MapArgs args{};
  args.source = source;
  args.source_positions = p.layer.in.positions();
  args.stored = stored;
  args.positions = p.layer.out.positions();
  args.rows = rows_;
  args.from = p.map.table.from.data();
  args.scale = p.map.scale.data();
  args.shift = p.map.shift.data();
  args.scale_positions = p.map.scale_positions;
  args.unit_begin = int(units.begin);
  args.unit_end = int(units.end);
  args.activation = activation;
  args.slope = slope;
  table.map_forward(args);
}

void Passes::reorder_forward(const KernelTable& table, const PackedLayer& p, const char* source, char* stored) const {
  const Range mine = me_.share(p.layer.out.elements());
  table.reorder_forward({source, p.layer.in.positions(), stored, p.layer.out.positions(), rows_, mine.begin, mine.end});
}

// --- backward ---------------------------------------------------------------------------------------------

void Passes::backward() {
  for (size_t n = g_.layers.size(); n-- > 0;) {
    backward_layer(n);
    watch_.backward(n);
    meet();
    if (n > 0 && n + 1 == g_.layers.size() && widens_last_input(g_) && rows_ > 1) {
      narrow_gradient(n);
      watch_.backward(n);
      meet();
    }
  }
  if (takes_latent_gradient(g_))
    add_latent_panels(g_.layers[0].forward, w_.latent_sums.floats(), rows_, latent_units(), w_.gradient.floats());
}

// The gradient of a layer's output -> that of its input, times the derivative of the activation below.
void Passes::backward_layer(size_t n) {
  const PackedLayer& p = g_.layers[n];
  const bool last = n + 1 == g_.layers.size(), single = rows_ == 1;
  const char* const source = last ? w_.image_gradient.data() : single ? w_.delta[n].data() : w_.stored[n].data();
  if (n == 0 && takes_latent_gradient(g_))
    return sum_latent_panels(p.forward, source, rows_, w_.latent_sums.floats(), me_);

  LayerWork work{source, rows_, w_.gradient.data(), Epilogue::kRaw, Activation::kIdentity, 1.0f, {}};
  if (n > 0) {
    const PackedLayer& below = g_.layers[n - 1];
    work.activation = below.layer.activation;
    work.slope = below.slope;
    if (single) {
      work.destination = w_.scratch.data();
      work.finish.kernel = table_of(g_).finish_gradient;
      FinishArgs& finish = work.finish.args;
      finish.sums = w_.scratch.floats();
      finish.stored = w_.stored[n - 1].data();
      finish.delta = w_.delta[n - 1].data();
      finish.order = below.gradient_order.data();
      finish.places = p.layer.in.positions();
      finish.activation = work.activation;
      finish.slope = work.slope;
    } else {
      work.epilogue = Epilogue::kGradient;
      work.destination = last && widens_last_input(g_) ? w_.wide.data() : w_.stored[n - 1].data();
    }
  }
  const bool columns = last && g_.columns;
  if (!p.layer.has_matrix()) {
    pass_gradient(p, last ? *g_.set->float32 : table_of(g_), work);
    if (!work.finish.kernel) return;
    watch_.backward(n);
    meet();
    const Range units = me_.share(units_of(p.layer.in.c, kUnitFloats));
    work.finish(int(units.begin) * kUnitFloats, int(units.end) * kUnitFloats, {0, work.finish.args.places});
  } else if (single && n > 0 && p.backward.tap_runs && !columns) {
    tap_schedule(p.backward, work, me_);
  } else {
    if (columns) work.rows = g_.image_positions * rows_;
    row_schedule(p.backward, work, me_);
  }
}

void Passes::pass_gradient(const PackedLayer& p, const KernelTable& table, const LayerWork& work) const {
  const PassedGradient passed{
      work.source, p.layer.out.positions(), work.destination, work.epilogue, p.layer.in.positions(),
      rows_,       work.activation,         work.slope};
  if (p.layer.kind == Kind::kReorder) {
    const Range mine = me_.share(p.layer.in.elements());
    return table.reorder_backward({passed, mine.begin, mine.end});
  }
  const Range units = me_.share(units_of(p.layer.in.c, kUnitFloats));
  table.map_backward({passed, p.map.table.readers.begin.data(), p.map.table.readers.items.data(), p.map.scale.data(),
                      p.map.scale_positions, int(units.begin), int(units.end)});
}

// The last layer's gradient, float32, over the stored output of the layer below, bfloat16.
void Passes::narrow_gradient(size_t n) {
  const Layer& l = g_.layers[n].layer;
  const Range units = me_.share(units_of(l.in.c, kUnitFloats));
  table_of(g_).narrow(w_.wide.floats(), w_.stored[n - 1].data(), int(units.begin), int(units.end),
                      int64_t(l.in.positions()) * rows_);
}

}  // namespace defgan::cpu
