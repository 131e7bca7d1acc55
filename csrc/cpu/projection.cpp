// A team of threads takes a block of rows through all steps. With many rows every thread is a team of its
// own and nobody waits; a few rows are shared by a larger team, layer by layer, with a barrier between.
//
// Two schedules for a layer (the same sums in the same order, so the same bits):
//   row schedule, two rows or more: a tile is the block's rows at one output position, all taps in the kernel;
//   tap schedule, one row: a tile is up to 14 output positions, one tap after the other, sums in scratch.
// A stored activation is overwritten by its gradient in the row schedule; the tap schedule writes gradients
// to buffers of their own, in the order of positions that the next layer down reads contiguously.
#include "projection.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>

#include "team.h"

namespace defgan::cpu {
namespace {

constexpr int64_t kWorkingMemory = 200 << 20;
// Beyond it a block is one tile of rows, not two: activations that leave the caches cost more than the second tile's
// use of the same weights gains (64x64 images: with AVX2 72% of the peak at 12 rows, 14 MB, and 77% at 6; with AMX 32
// rows take 2.2 times as long as 16).
constexpr int64_t kBlockMemory = 8 << 20;

// Of so many rows two panels at one position were faster than one panel at two (by 2 of 75 points, AVX-512; for four and
// six rows it is the other way round, by 1 and 4).
constexpr int kWideRows = 5;

int64_t units_of(int channels, int unit_channels) { return (channels + unit_channels - 1) / unit_channels; }

// Float32 units, an even number of them: kernels without tails write whole panels. bfloat16 needs no more.
int64_t buffer_bytes(const Shape& shape, int rows) {
  return 2 * units_of(shape.c, 2 * kUnitFloats) * shape.positions() * rows * kUnitBytes;
}

// Where the first layer's forward weights give the latent's gradient, every panel of them leaves sums of its own, which
// are then added up in order: so which thread computes which panel does not matter.
bool takes_latent_gradient(const PackedGenerator& g) {
  return g.layers.size() > 1 && g.layers[0].layer.has_matrix() && g.layers[0].forward.gives_latent_gradient();
}

int64_t latent_sums_bytes(const PackedGenerator& g, int rows) {
  if (!takes_latent_gradient(g)) return 0;
  const Gemm& forward = g.layers[0].forward;
  return (forward.panels + forward.tail) * buffer_bytes({g.plan.latent_size(), 1, 1}, rows);
}

// One block's buffers; row counts vary, the capacity does not.
struct Workspace {
  int capacity, rows = 0;
  Buffer latent, velocity, gradient, start_units, image, target, image_delta, columns, image_gradient, wide, scratch,
      latent_sums;
  std::vector<Buffer> stored, delta;

  Workspace(const PackedGenerator& g, int capacity) : capacity(capacity) {
    const Plan& plan = g.plan;
    const int k = plan.latent_size();
    latent = Buffer(size_t(capacity) * k * 4);
    velocity = Buffer(size_t(capacity) * k * 4);
    gradient = Buffer(size_t(buffer_bytes({k, 1, 1}, capacity)));
    start_units = Buffer(size_t(buffer_bytes({k, 1, 1}, capacity)));
    image = Buffer(size_t(capacity) * g.pixel_stride() * 4);
    target = Buffer(size_t(capacity) * g.pixel_stride() * 4);
    image_delta = Buffer(size_t(capacity) * g.pixel_stride() * 4);
    const int places = std::max(g.image_places, g.float32().image_places);
    const int units = std::max(g.image_units, g.float32().image_units);
    columns = Buffer(size_t(places) * units * capacity * kUnitBytes);
    image_gradient = Buffer(size_t(places) * units * capacity * kUnitBytes);
    if (g.exact) wide = Buffer(size_t(buffer_bytes(plan.layers.back().in, capacity)));
    int64_t scratch_bytes = 0;
    for (size_t n = 0; n + 1 < plan.layers.size(); ++n) {
      const Layer& l = plan.layers[n];
      stored.emplace_back(size_t(buffer_bytes(l.out, capacity)));
      delta.emplace_back(size_t(buffer_bytes(l.out, 1)));
      const bool transcendental = l.activation == Activation::kSigmoid || l.activation == Activation::kTanh;
      scratch_bytes = std::max(scratch_bytes, buffer_bytes(l.out, transcendental ? capacity : 1));
    }
    latent_sums = Buffer(size_t(latent_sums_bytes(g, capacity)));
    scratch = Buffer(size_t(scratch_bytes));
  }

  // Padding channels are not always written, and may be read against weights of zero: they must not hold what
  // another row count or, where `mixed`, another precision left there.
  void prepare(int next_rows, bool mixed) {
    if (next_rows == rows && !mixed) return;
    rows = next_rows;
    for (std::vector<Buffer>* list : {&stored, &delta})
      for (Buffer& b : *list) std::memset(b.data(), 0, b.size());
    for (Buffer* b : {&start_units, &image_gradient, &wide, &gradient, &target, &scratch})
      if (b->data()) std::memset(b->data(), 0, b->size());
  }
};

int64_t workspace_bytes(const PackedGenerator& g, int rows) {
  const Plan& plan = g.plan;
  int64_t total = 4 * buffer_bytes({plan.latent_size(), 1, 1}, rows) + int64_t(3) * g.pixel_stride() * rows * 4;
  total += int64_t(2) * g.image_places * g.image_units * rows * kUnitBytes;
  for (size_t n = 0; n + 1 < plan.layers.size(); ++n) total += buffer_bytes(plan.layers[n].out, rows);
  total += latent_sums_bytes(g, rows);
  return total + (g.exact ? buffer_bytes(plan.layers.back().in, rows) : 0);
}

// Of all layers but the last.
const KernelTable* table_of(const PackedGenerator& g) {
  return g.precision == Precision::kBfloat16 ? g.set->bfloat16 : g.set->float32;
}

// One thread's clock. Without a profile to fill it costs a comparison at each change of work.
class Stopwatch {
 public:
  explicit Stopwatch(Profile* profile, size_t layers) : profile_(profile) {
    if (!profile_) return;
    times_.forward.assign(layers, 0.0);
    times_.backward.assign(layers, 0.0);
    mark_ = Clock::now();
  }
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch() {
    if (!profile_) return;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    profile_->forward.resize(times_.forward.size());
    profile_->backward.resize(times_.backward.size());
    for (size_t n = 0; n < times_.forward.size(); ++n) {
      profile_->forward[n] += times_.forward[n];
      profile_->backward[n] += times_.backward[n];
    }
    profile_->image += times_.image;
    profile_->latent += times_.latent;
    profile_->waiting += times_.waiting;
  }
  // The time since the last call, by what it was spent on.
  void forward(size_t layer) {
    if (profile_) times_.forward[layer] += lap();
  }
  void backward(size_t layer) {
    if (profile_) times_.backward[layer] += lap();
  }
  void image() {
    if (profile_) times_.image += lap();
  }
  void latent() {
    if (profile_) times_.latent += lap();
  }
  void waiting() {
    if (profile_) times_.waiting += lap();
  }

 private:
  using Clock = std::chrono::steady_clock;
  double lap() {
    const Clock::time_point now = Clock::now();
    const double seconds = std::chrono::duration<double>(now - mark_).count();
    mark_ = now;
    return seconds;
  }
  Profile* profile_;
  Profile times_;
  Clock::time_point mark_;
};

class Block {
 public:
  Block(const PackedGenerator& generator, Workspace& workspace, const Member& member, Profile* profile)
      : g_(generator),
        w_(workspace),
        me_(member),
        image_(*generator.set->image),
        watch_(profile, generator.layers.size()) {}

  void project(const ProjectArgs& args, int64_t first, int rows) {
    const int k = g_.plan.latent_size(), pixels = g_.pixels(), stride = g_.pixel_stride();
    if (me_.id == 0) {
      w_.prepare(rows, g_.exact != nullptr);
      for (int row = 0; row < rows; ++row) {
        const int64_t image = (first + row) / args.restarts, restart = (first + row) % args.restarts;
        const int64_t start = (args.start_per_image ? image * args.restarts : 0) + restart;
        std::memcpy(w_.latent.floats() + int64_t(row) * k, args.start + start * k, size_t(k) * 4);
        std::memcpy(w_.target.floats() + int64_t(row) * stride, args.images + image * pixels, size_t(pixels) * 4);
      }
      std::memset(w_.velocity.data(), 0, w_.velocity.size());
    }
    me_.meet();
    watch_.latent();
    rows_ = rows;
    int64_t u0, u1;
    me_.share(units_of(k, kUnitFloats), &u0, &u1);
    store_latent(g_, int(u0), int(u1));
    for (int step = 0; step < args.steps; ++step) {
      forward(g_);
      const ImageArgs image = image_args(g_);
      if (image.pixel_begin < image.pixel_end) image_.gradient(image);
      watch_.image();
      meet();
      int64_t run0, run1;
      me_.share(int64_t(g_.runs.size()), &run0, &run1);
      image_.scatter(w_.image_delta.floats(), stride, rows, g_.runs.data() + run0, g_.runs.data() + run1,
                     w_.image_gradient.floats());
      watch_.image();
      meet();
      backward();
      if (takes_latent_gradient(g_)) add_latent_sums(int(u0), int(u1));
      image_.update(w_.latent.floats(), w_.velocity.floats(), w_.gradient.floats(), k, rows, int(u0), int(u1),
                    args.rates[step], args.momentum);
      watch_.latent();
      if (step + 1 < args.steps) store_latent(g_, int(u0), int(u1));
    }
    // The error that picks the restart is that of the exact generator.
    store_latent(g_.float32(), int(u0), int(u1));
    forward(g_.float32());
    me_.meet();
    for (int row = me_.id; row < rows; row += me_.size)
      args.errors[first + row] =
          image_.error(w_.image.floats() + int64_t(row) * stride, w_.target.floats() + int64_t(row) * stride, pixels);
    if (me_.id == 0) std::memcpy(args.latents + first * k, w_.latent.data(), size_t(rows) * k * 4);
    me_.meet();
  }

  void decode(const float* latents, float* images, int64_t first, int rows) {
    const int k = g_.plan.latent_size(), pixels = g_.pixels();
    if (me_.id == 0) {
      w_.prepare(rows, false);
      std::memcpy(w_.latent.data(), latents + first * k, size_t(rows) * k * 4);
    }
    me_.meet();
    rows_ = rows;
    int64_t u0, u1;
    me_.share(units_of(k, kUnitFloats), &u0, &u1);
    store_latent(g_.float32(), int(u0), int(u1));
    forward(g_.float32());
    me_.meet();
    if (me_.id == 0)
      for (int row = 0; row < rows; ++row)
        std::memcpy(images + (first + row) * pixels, w_.image.floats() + int64_t(row) * g_.pixel_stride(),
                    size_t(pixels) * 4);
    me_.meet();
  }

 private:
  const PackedGenerator& g_;
  Workspace& w_;
  const Member& me_;
  const ImageKernels& image_;
  Stopwatch watch_;
  int rows_ = 0;

  void meet() {
    me_.meet();
    watch_.waiting();
  }

  // What follows a tile of raw sums in scratch.
  struct Finish {
    enum { kNothing, kForward, kGradient } what = kNothing;
    char* stored = nullptr;
    char* delta = nullptr;
    const int* order = nullptr;
    const KernelTable* table = nullptr;
    Activation activation = Activation::kIdentity;
    float slope = 1;
    int64_t places = 0;
    void operator()(const float* scratch, int c0, int c1, int64_t begin, int64_t end) const {
      if (what == kForward) table->finish_forward(scratch, stored, c0, c1, begin, end, places, activation, slope);
      if (what == kGradient)
        table->finish_gradient(scratch, stored, delta, order, c0, c1, begin, end, places, activation, slope);
    }
  };

  // The last layer is always float32, so a generator of one layer reads its latent as float32.
  static const KernelTable* latent_table(const PackedGenerator& g) {
    return g.layers.size() == 1 ? g.set->float32 : table_of(g);
  }

  void store_latent(const PackedGenerator& g, int u0, int u1) {
    if (u0 < u1)
      latent_table(g)->store_latent(w_.latent.floats(), g.plan.latent_size(), rows_, u0, u1, w_.start_units.data());
    watch_.latent();
    meet();
  }

  ImageArgs image_args(const PackedGenerator& g) const {
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
    int64_t begin, end;
    me_.share(a.pixels, &begin, &end, kUnitFloats);
    a.pixel_begin = int(begin);
    a.pixel_end = int(end);
    a.activation = g.plan.layers.back().activation;
    a.slope = g.layers.back().slope;
    return a;
  }

  // latent -> image; on return every thread has its own pixels, nobody has met yet.
  void forward(const PackedGenerator& g) {
    const size_t last = g.layers.size() - 1;
    const char* source = w_.start_units.data();
    for (size_t n = 0; n < last; ++n) {
      const PackedLayer& p = g.layers[n];
      char* stored = w_.stored[n].data();
      if (p.layer.kind == Kind::kMap) {
        map_forward(table_of(g), p, source, stored, p.layer.activation, p.slope);
      } else if (p.layer.kind == Kind::kReorder) {
        reorder_forward(table_of(g), p, source, stored);
      } else {
        Finish finish;
        finish.stored = stored;
        finish.table = p.forward.table;
        finish.activation = p.layer.activation;
        finish.slope = p.slope;
        finish.places = int64_t(p.layer.out.positions()) * rows_;
        const bool transcendental =
            p.layer.activation == Activation::kSigmoid || p.layer.activation == Activation::kTanh;
        if (rows_ == 1 && p.forward.has_tap_schedule()) {
          finish.what = Finish::kForward;
          tap_schedule(p.forward, source, finish);
        } else if (transcendental) {
          finish.what = Finish::kForward;
          row_schedule(p.forward, Epilogue::kRaw, source, rows_, w_.scratch.data(), finish);
        } else {
          row_schedule(p.forward, Epilogue::kActivate, source, rows_, stored, finish);
        }
      }
      watch_.forward(n);
      meet();
      source = stored;
    }
    const PackedLayer& p = g.layers[last];
    if (last > 0 && g.precision == Precision::kBfloat16) {
      const int64_t places = int64_t(p.layer.in.positions()) * rows_;
      int64_t u0, u1;
      me_.share(units_of(p.layer.in.c, kUnitFloats), &u0, &u1);
      table_of(g)->expand(source, w_.wide.floats(), int(u0), int(u1), places);
      watch_.forward(last);
      meet();
      source = w_.wide.data();
    }
    char* columns = w_.columns.data();
    if (p.layer.kind == Kind::kMap)
      map_forward(g.set->float32, p, source, columns, Activation::kIdentity, 1.0f);
    else if (p.layer.kind == Kind::kReorder)
      reorder_forward(g.set->float32, p, source, columns);
    else
      row_schedule(p.forward, Epilogue::kRaw, source, g.columns ? g.image_places * rows_ : rows_, columns, Finish());
    watch_.forward(last);
    meet();
    const ImageArgs image = image_args(g);
    if (image.pixel_begin < image.pixel_end) image_.forward(image);
    watch_.image();
  }

  // The image's gradient -> the latent's, in w_.gradient.
  void backward() {
    const PackedGenerator& g = g_;
    const size_t last = g.layers.size() - 1;
    for (size_t n = last + 1; n-- > 0;) {
      const PackedLayer& p = g.layers[n];
      const bool narrow = n == last && last > 0 && g.precision == Precision::kBfloat16;
      const bool flat = n == last && g.columns;
      const char* source = n == last ? w_.image_gradient.data() : rows_ == 1 ? w_.delta[n].data() : w_.stored[n].data();
      const KernelTable* table = n == last ? g.set->float32 : table_of(g);
      Finish finish;
      Activation activation = Activation::kIdentity;
      float slope = 1;
      if (n > 0) {
        activation = g.layers[n - 1].layer.activation;
        slope = g.layers[n - 1].slope;
      }
      const int64_t places = int64_t(p.layer.in.positions()) * rows_;
      const bool raw = n == 0 || rows_ == 1;
      char* destination = n == 0       ? w_.gradient.data()
                          : rows_ == 1 ? w_.scratch.data()
                          : narrow     ? w_.wide.data()
                                       : w_.stored[n - 1].data();
      finish.activation = activation;
      finish.slope = slope;
      finish.places = places;
      if (n > 0 && rows_ == 1) {
        finish.what = Finish::kGradient;
        finish.stored = w_.stored[n - 1].data();
        finish.delta = w_.delta[n - 1].data();
        finish.order = g.layers[n - 1].gradient_order.data();
        finish.table = table_of(g);
      }
      if (n == 0 && takes_latent_gradient(g)) {
        latent_sums(p.forward, source);
      } else if (p.layer.has_matrix()) {
        if (rows_ == 1 && n > 0 && p.backward.has_tap_schedule() && !flat) {
          tap_schedule(p.backward, source, finish);
        } else {
          row_schedule(p.backward, raw ? Epilogue::kRaw : Epilogue::kGradient, source,
                       flat ? g.image_places * rows_ : rows_, destination, finish);
        }
      } else {
        if (p.layer.kind == Kind::kMap) {
          int64_t u0, u1;
          me_.share(units_of(p.layer.in.c, kUnitFloats), &u0, &u1);
          table->map_backward(source, p.layer.out.positions(), destination, raw, p.layer.in.positions(), rows_,
                              p.map.to_begin.data(), p.map.to.data(), p.map.scale.data(), p.map.scale_positions,
                              int(u0), int(u1), activation, slope);
        } else {
          int64_t e0, e1;
          me_.share(p.layer.in.elements(), &e0, &e1);
          table->reorder_backward(source, p.layer.out.positions(), destination, raw, p.layer.in.positions(), rows_, e0,
                                  e1, activation, slope);
        }
        if (finish.what == Finish::kGradient) {
          watch_.backward(n);
          meet();
          int64_t u0, u1;
          me_.share(units_of(p.layer.in.c, kUnitFloats), &u0, &u1);
          finish(w_.scratch.floats(), int(u0) * kUnitFloats, int(u1) * kUnitFloats, 0, places);
        }
      }
      watch_.backward(n);
      meet();
      if (narrow && rows_ > 1) {
        int64_t u0, u1;
        me_.share(units_of(p.layer.in.c, kUnitFloats), &u0, &u1);
        table_of(g)->narrow(w_.wide.floats(), w_.stored[n - 1].data(), int(u0), int(u1), places);
        watch_.backward(n);
        meet();
      }
    }
  }

  // The latent's gradient by panels of the first layer's forward weights. A thread's share are those panels that it reads
  // in the forward pass, or nearly so, and it ends with those that it will begin with there: they are still in its cache.
  void latent_sums(const Gemm& g, const char* source) const {
    const KernelTable& table = *g.table;
    const int tiles = (rows_ + table.max_latent_rows - 1) / table.max_latent_rows;
    const int units = units_of(g.source_channels, kUnitFloats);
    const int unit_steps = kUnitFloats * kUnitFloats / table.unit_channels;
    const int64_t sums_stride = buffer_bytes({g.source_channels, 1, 1}, rows_) / 4;
    LatentArgs args{};
    args.position_stride = int64_t(rows_) * kUnitBytes;
    args.unit_stride = int64_t(g.destination_positions) * rows_ * kUnitBytes;
    args.taps = g.latent_taps.data();
    args.tap_count = int(g.latent_taps.size());
    int64_t begin, end;  // of all panels' units
    me_.share(int64_t(g.panels + g.tail) * units, &begin, &end);
    for (int panel = g.panels + g.tail; panel-- > 0;) {
      const bool tail = panel >= g.panels;
      const int channel = panel * 2 * table.lanes;
      args.matrix_stride = tail ? g.tail_matrix_stride : g.matrix_stride;
      const int64_t first = int64_t(panel) * units;
      for (int64_t item = std::max(begin, first); item < std::min(end, first + units); ++item) {
        const int unit = int(item - first);
        args.weights = g.panel(panel) + int64_t(unit) * unit_steps * (tail ? 1 : 2) * table.lanes * 4;
        args.steps = std::min(unit_steps, g.steps - unit * unit_steps);
        for (int tile = 0; tile < tiles; ++tile) {
          const int r0 = rows_ * tile / tiles, r1 = rows_ * (tile + 1) / tiles;
          args.source = source + (channel / table.unit_channels) * args.unit_stride + int64_t(r0) * kUnitBytes +
                        (channel % table.unit_channels) * (kUnitBytes / table.unit_channels);
          args.sums = w_.latent_sums.floats() + panel * sums_stride + (int64_t(unit) * rows_ + r0) * kUnitFloats;
          table.latent[tail ? 0 : 1][r1 - r0](args);
        }
      }
    }
  }

  void add_latent_sums(int u0, int u1) const {
    const Gemm& g = g_.layers[0].forward;
    const int64_t sums_stride = buffer_bytes({g.source_channels, 1, 1}, rows_) / 4;
    const int64_t first = int64_t(u0) * rows_ * kUnitFloats, count = int64_t(u1 - u0) * rows_ * kUnitFloats;
    float* total = w_.gradient.floats() + first;
    const float* sums = w_.latent_sums.floats() + first;
    std::copy_n(sums, count, total);
    for (int panel = 1; panel < g.panels + g.tail; ++panel) {
      sums += sums_stride;
      for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
    }
  }

  void map_forward(const KernelTable* table, const PackedLayer& p, const char* source, char* stored,
                   Activation activation, float slope) {
    int64_t u0, u1;
    me_.share(units_of(p.layer.out.c, kUnitFloats), &u0, &u1);
    table->map_forward(source, p.layer.in.positions(), stored, p.layer.out.positions(), rows_, p.map.from.data(),
                       p.map.scale.data(), p.map.shift.data(), p.map.scale_positions, int(u0), int(u1), activation,
                       slope);
  }

  void reorder_forward(const KernelTable* table, const PackedLayer& p, const char* source, char* stored) {
    int64_t e0, e1;
    me_.share(p.layer.out.elements(), &e0, &e1);
    table->reorder_forward(source, p.layer.in.positions(), stored, p.layer.out.positions(), rows_, e0, e1);
  }

  // Tiles of rows of one position, or of two where kernels take twins; this thread's share of them.
  void row_schedule(const Gemm& g, Epilogue epilogue, const char* source, int rows, char* destination,
                    const Finish& finish) const {
    const KernelTable& table = *g.table;
    const int panel_channels = 2 * table.lanes;
    const int unit_channels = epilogue == Epilogue::kRaw ? kUnitFloats : table.unit_channels;
    GemmArgs args{};
    args.unit_stride = int64_t(g.source_positions) * rows * kUnitBytes;
    args.position_stride = int64_t(rows) * kUnitBytes;
    args.destination_unit_stride = int64_t(g.destination_positions) * rows * kUnitBytes;
    args.steps = g.steps;
    args.panel_stride = g.panel_stride;
    args.activation = finish.activation;
    args.slope = finish.slope;
    const int64_t places = int64_t(g.order.size());
    const bool fetches_ahead = int64_t(g.weights.size()) >= table.ahead_bytes;
    // A weight that is loaded once serves all accumulators of a tile, which fill the registers: many rows of one panel, few
    // rows of two positions, or, where there are such kernels, few rows of several panels. But a group of panels at a place
    // is one thread's, so there must be one for each.
    const bool wide = rows <= table.max_rows[2] && (!g.paired || rows == kWideRows);
    const bool twins = table.twins && 2 * rows <= table.max_rows[1] && !wide;
    const int tile_rows = twins ? 2 * rows : rows;
    int widest = 1;
    for (int group = 2; group < kGroups; ++group) {
      const int64_t groups = (g.panels + kGroupPanels[group] - 1) / kGroupPanels[group];
      if (tile_rows <= table.max_rows[group] && groups * places >= me_.size) widest = group;
    }
    const int64_t total = int64_t(2 * g.panels + g.tail) * places;  // in vectors
    const int64_t begin = total * me_.id / me_.size, end = total * (me_.id + 1) / me_.size;
    int64_t item = 0;
    for (int panel = 0; panel < g.panels + g.tail;) {
      int group = panel < g.panels ? widest : 0;
      while (group > 1 && kGroupPanels[group] > g.panels - panel) --group;
      const int vectors = group == 0 ? 1 : 2 * kGroupPanels[group];
      const int tiles = (rows + table.max_rows[group] - 1) / table.max_rows[group];
      const int channel = panel * panel_channels;
      args.matrix_stride = group == 0 ? g.tail_matrix_stride : g.matrix_stride;
      args.weights = g.panel(panel);
      const int64_t step_stride = (group == 0 ? 1 : 2) * table.lanes * 4;
      const int64_t offset = (channel / unit_channels) * args.destination_unit_stride +
                             (channel % unit_channels) * (kUnitBytes / unit_channels);
      for (int64_t i = 0; i < places; ++i) {
        // A place belongs to one thread; with a single one (flattened or fully connected) its tiles are shared.
        const bool split_tiles = places == 1 && tiles > 1;
        if (!split_tiles) {
          const int64_t at = item;
          item += vectors;
          if (at < begin || at >= end) continue;
        }
        const Place& place = g.order[size_t(i)];
        const auto taps_of = [&](int position) { return g.taps.data() + g.tap_begin[size_t(position)]; };
        const auto finish_rows = [&](int position, int r0, int r1) {
          if (finish.what != Finish::kNothing)
            finish(reinterpret_cast<const float*>(destination), channel, channel + vectors * table.lanes,
                   int64_t(position) * rows + r0, int64_t(position) * rows + r1);
        };
        const bool together = twins && place.twin >= 0 && 2 * rows <= table.max_rows[group];
        const float calls = place.twin >= 0 && !together ? 2 : 1;
        if (fetches_ahead) {
          args.ahead = args.weights + place.ahead_step * step_stride;
          args.ahead_advance = int64_t(place.ahead_rate / calls * float(step_stride * kUnitFloats));
        }
        if (together) {
          args.twin_taps = taps_of(place.twin);
          args.twin_destination = destination + offset + int64_t(place.twin) * rows * kUnitBytes;
        }
        for (const int position : {place.position, place.twin}) {
          if (position < 0) continue;
          args.taps = taps_of(position);
          args.tap_count = g.tap_begin[size_t(position) + 1] - g.tap_begin[size_t(position)];
          args.bias = g.bias.empty() ? nullptr : g.bias.data() + position * g.bias_position_stride + channel;
          int64_t tile_begin = 0, tile_end = tiles;
          if (split_tiles) me_.share(tiles, &tile_begin, &tile_end);
          for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
            const int r0 = int(int64_t(rows) * tile / tiles), r1 = int(int64_t(rows) * (tile + 1) / tiles);
            args.rows = r1 - r0;
            args.source = source + int64_t(r0) * kUnitBytes;
            args.destination = destination + offset + (int64_t(position) * rows + r0) * kUnitBytes;
            (together ? table.gemm_twins : table.gemm)[int(epilogue)][group][r1 - r0](args);
            finish_rows(position, r0, r1);
          }
          if (together) {
            finish_rows(place.twin, 0, rows);
            break;
          }
          if (fetches_ahead) args.ahead += args.ahead_advance * args.tap_count * units_of(args.steps, kUnitFloats);
        }
      }
      panel += group == 0 ? 1 : kGroupPanels[group];
    }
  }

  // One row: tap after tap over rectangles of positions, sums in scratch. Threads share panels and lines.
  void tap_schedule(const Gemm& g, const char* source, const Finish& finish) const {
    const KernelTable& table = *g.table;
    const int panel_channels = 2 * table.lanes, panels = g.panels + g.tail;
    const int width = g.destination_width, height = g.destination_positions / width;
    const int slices = panels % me_.size == 0 ? 1 : std::min(me_.size, height);
    float* const scratch = w_.scratch.floats();
    const int64_t unit_floats = int64_t(g.destination_positions) * kUnitFloats;
    TapArgs args{};
    args.steps = g.steps;
    args.unit_stride = int64_t(g.source_positions) * kUnitBytes;
    args.destination_unit_stride = unit_floats * 4;
    const int items = panels * slices;
    for (int item = items * me_.id / me_.size; item < items * (me_.id + 1) / me_.size; ++item) {
      const int panel = item / slices, slice = item % slices;
      const int y0 = height * slice / slices, y1 = height * (slice + 1) / slices;
      const bool tail = panel >= g.panels;
      const int channel = panel * panel_channels, channels = tail ? table.lanes : panel_channels;
      for (int c = channel; c < channel + channels; c += table.lanes) {
        float* d = scratch + (c / kUnitFloats) * unit_floats + c % kUnitFloats;
        for (int p = y0 * width; p < y1 * width; ++p) {
          if (g.bias.empty())
            std::memset(d + int64_t(p) * kUnitFloats, 0, size_t(table.lanes) * 4);
          else
            std::memcpy(d + int64_t(p) * kUnitFloats, g.bias.data() + p * g.bias_position_stride + c,
                        size_t(table.lanes) * 4);
        }
      }
      char* const destination =
          reinterpret_cast<char*>(scratch + (channel / kUnitFloats) * unit_floats + channel % kUnitFloats);
      for (const Run& v : g.vertical) {
        // The run's lines that fall into this slice.
        int first = y0 <= v.destination ? 0 : (y0 - v.destination + v.destination_step - 1) / v.destination_step;
        int last = y1 <= v.destination ? 0 : (y1 - 1 - v.destination) / v.destination_step + 1;
        last = std::min(last, v.count);
        if (first >= last) continue;
        for (const Run& h : g.horizontal) {
          args.weights =
              g.panel(panel) + (v.set * g.horizontal_sets + h.set) * (tail ? g.tail_matrix_stride : g.matrix_stride);
          args.destination_step = int64_t(h.destination_step) * kUnitBytes;
          // The next matrix is fetched while this one is used, which takes about so many tiles.
          const int64_t tiles = int64_t(h.count) * (last - first) / table.max_positions + 1;
          args.ahead = args.weights + (tail ? g.tail_matrix_stride : g.matrix_stride);
          args.ahead_advance = (tail ? 1 : 2) * table.lanes * 4 / tiles;
          const int pieces = (h.count + table.max_segment - 1) / table.max_segment;
          const int phase_start = phase_position(h.source, g.phases, g.source_width);
          for (int piece = 0; piece < pieces; ++piece) {
            const int x0 = h.count * piece / pieces, x1 = h.count * (piece + 1) / pieces;
            const int tall = std::max(1, std::min(table.max_segments, table.max_positions / (x1 - x0)));
            const int bands = (last - first + tall - 1) / tall;
            for (int band = 0; band < bands; ++band) {
              const int s0 = first + (last - first) * band / bands, s1 = first + (last - first) * (band + 1) / bands;
              for (int s = s0; s < s1; ++s) {
                const int sy = v.source + s * v.source_step, dy = v.destination + s * v.destination_step;
                args.source[s - s0] = source + (int64_t(sy) * g.source_width + phase_start + x0) * kUnitBytes;
                args.destination[s - s0] =
                    destination + (int64_t(dy) * width + h.destination + x0 * h.destination_step) * kUnitBytes;
              }
              args.positions = x1 - x0;
              table.tap[tail ? 0 : 1][s1 - s0][x1 - x0](args);
              args.ahead += args.ahead_advance * args.steps;
            }
          }
        }
      }
      finish(scratch, channel, channel + channels, int64_t(y0) * width, int64_t(y1) * width);
    }
  }

  static int phase_position(int x, int phases, int width) {
    int start = 0;
    for (int phase = 0; phase < x % phases; ++phase) start += (width - phase + phases - 1) / phases;
    return start + x / phases;
  }
};

// How `rows` rows are cut into blocks and shared by teams.
struct Division {
  int teams = 1;
  int64_t blocks = 0;
  int block_rows = 1;  // of the largest block
};

Division divide(const PackedGenerator& g, int64_t rows, int threads, int64_t max_rows) {
  // Rows of a block: as many as fill the registers, twice that where the weights of a tile are used by few rows and
  // activations are small.
  const KernelTable& table = *table_of(g);
  const int tile = table.tile_registers ? table.max_rows[1] / 2 : table.max_rows[1];
  const bool many_rows = tile >= 12 && !table.tile_registers;
  const int64_t per_row = workspace_bytes(g, 1);
  const int largest = many_rows || 2 * tile * per_row > kBlockMemory ? tile : 2 * tile;
  // Rough relative speed of a block of n rows in one thread: short tiles leave the multiply-add units idle; where
  // tiles are registers of their own, the weights' way to them costs as much as another row.
  const auto speed = [&table](int64_t n) {
    if (table.tile_registers) return double(n) / double(n + 1);
    return n >= 5 ? 1.0 : n == 4 ? 0.95 : n == 3 ? 0.9 : 0.8;
  };
  Division best;
  double best_time = 0;
  for (int teams = 1; teams <= threads; ++teams) {
    if (threads % teams != 0 && teams != threads) continue;
    int64_t limit = std::min<int64_t>(largest, std::max<int64_t>(1, kWorkingMemory / (per_row * teams)));
    if (max_rows > 0) {
      if (max_rows < teams) break;
      limit = std::min<int64_t>(limit, max_rows / teams);
    }
    const int64_t each = (rows + teams - 1) / teams;
    const int64_t count = (each + limit - 1) / limit;
    const int64_t block = (each + count - 1) / count;
    const int size = threads / teams;
    const double time = double(each) / speed(block) / (size * (size > 1 ? 0.93 : 1.0));
    if (teams == 1 || time < best_time * 0.999) {
      best_time = time;
      best.teams = teams;
      best.blocks = std::min<int64_t>(count * teams, rows);
      best.block_rows = int((rows + best.blocks - 1) / best.blocks);
    }
  }
  return best;
}

// What a working thread changes of its processor's state, and puts back: the caller's own thread is one of the team.
class ProcessorState {
 public:
  explicit ProcessorState(const InstructionSet& set) : set_(set) {
#if defined(__x86_64__)
    // Numbers too small for float32's exponent become zero. A sigmoid that saturates makes many of them, and on some
    // processors an operation with one takes many times as long (docs/cpu.md).
    constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
    control_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(control_ | kFlushToZero | kDenormalsAreZero);
#endif
  }
  ProcessorState(const ProcessorState&) = delete;
  ~ProcessorState() {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(control_);
#endif
    if (set_.bfloat16->release) set_.bfloat16->release();
  }

 private:
  const InstructionSet& set_;
#if defined(__x86_64__)
  unsigned control_;
#endif
};

// Calls use(block, first row, rows) for every block, by teams.
template <class Use>
void for_blocks(const PackedGenerator& g, int64_t rows, int threads, int64_t max_rows, Profile* profile,
                const Use& use) {
  if (rows == 0) return;
  const Lease lease(threads);
  const Division division = divide(g, rows, lease.threads(), max_rows);
  const int size = lease.threads() / division.teams;
  struct Team {
    Workspace workspace;
    Barrier barrier;
    int64_t block = 0;
    Team(const PackedGenerator& g, int rows, int size) : workspace(g, rows), barrier(size) {}
  };
  std::vector<std::unique_ptr<Team>> teams;
  for (int t = 0; t < division.teams; ++t) teams.push_back(std::make_unique<Team>(g, division.block_rows, size));
  std::atomic<int64_t> next{0};
  run_threads(division.teams * size, [&](int thread) {
    Team& team = *teams[size_t(thread / size)];
    const Member member{thread % size, size, &team.barrier};
    const ProcessorState state(*g.set);
    Block block(g, team.workspace, member, profile);
    for (;;) {
      if (member.id == 0) team.block = next.fetch_add(1);
      member.meet();
      const int64_t index = team.block;
      if (index >= division.blocks) break;
      const int64_t first = rows * index / division.blocks, last = rows * (index + 1) / division.blocks;
      use(block, first, int(last - first));
    }
  });
}

}  // namespace

void project(const PackedGenerator& generator, const ProjectArgs& args) {
  for_blocks(generator, args.images_count * args.restarts, args.threads, args.max_rows, args.profile,
             [&](Block& block, int64_t first, int rows) { block.project(args, first, rows); });
}

void decode(const PackedGenerator& generator, const float* latents, int64_t count, int threads, int64_t max_rows,
            float* images) {
  for_blocks(generator, count, threads, max_rows, nullptr,
             [&](Block& block, int64_t first, int rows) { block.decode(latents, images, first, rows); });
}

}  // namespace defgan::cpu
