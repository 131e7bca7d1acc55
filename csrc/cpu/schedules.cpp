#include "schedules.h"

#include <algorithm>
#include <cstring>

#include "workspace.h"

namespace defgan::cpu {
namespace {

// For so many rows two panels at one position were faster than one panel at two (by 2 of 75 points, AVX-512; for four and
// six rows it is the other way round, by 1 and 4).
constexpr int kWideRows = 5;

// How a layer is cut into tiles for so many rows.
struct Tiling {
  TileWidth widest;    // of whole panels: those that are left at the end take narrower tiles
  bool twins;          // whether a position and its twin share a tile
  bool fetches_ahead;  // whether kernels fetch the weights that come next
};

// A weight that is loaded once serves all accumulators of a tile, which fill the registers: many rows of one panel, few
// rows of two positions, or, where there are such kernels, few rows of several panels. But the panels of a tile belong
// to one thread, so there must be tiles for each.
Tiling choose_tile(const Gemm& g, int rows, int members) {
  const KernelTable& table = *g.table;
  const bool wide = rows <= table.max_rows[kTwoPanels] && (!g.paired || rows == kWideRows);
  Tiling tiling{};
  tiling.fetches_ahead = int64_t(g.weights.size()) >= table.ahead_bytes;
  tiling.twins = table.twins && 2 * rows <= table.max_rows[kOnePanel] && !wide;
  tiling.widest = kOnePanel;
  const int tile_rows = tiling.twins ? 2 * rows : rows;
  for (const TileWidth width : {kTwoPanels, kFourPanels}) {
    const int64_t across = (g.panels + panels_of(width) - 1) / panels_of(width);
    if (tile_rows <= table.max_rows[width] && across * int64_t(g.order.size()) >= members) tiling.widest = width;
  }
  return tiling;
}

// Tiles of rows of one position, or of two where kernels take twins.
class RowSchedule {
 public:
  RowSchedule(const Gemm& gemm, const LayerWork& work, const Member& me)
      : g_(gemm), table_(*gemm.table), work_(work), me_(me), tiling_(choose_tile(gemm, work.rows, me.size)) {
    args_.unit_stride = int64_t(g_.source_positions) * work.rows * kUnitBytes;
    args_.position_stride = int64_t(work.rows) * kUnitBytes;
    args_.destination_unit_stride = int64_t(g_.destination_positions) * work.rows * kUnitBytes;
    args_.steps = g_.steps;
    args_.panel_stride = g_.panel_stride;
    args_.activation = work.activation;
    args_.slope = work.slope;
  }

  // This member's tiles: its share of all vectors, counted through all panels and positions.
  void my_tiles() {
    const int64_t stops = int64_t(g_.order.size());
    const int64_t vectors = int64_t(2 * g_.panels + g_.tail) * stops;
    const Range mine = me_.share(vectors);
    int64_t vector = 0;
    for (int panel = 0; panel < g_.panels + g_.tail; panel += std::max(1, panels_of(width_))) {
      begin_panel(panel);
      // A position's tiles belong to one thread; those of a single one (flattened or fully connected) are shared.
      const bool shares_tiles = stops == 1 && tiles_ > 1;
      if (shares_tiles) {
        run_tiles(g_.order[0], me_.share(tiles_));
        continue;
      }
      for (const Stop& stop : g_.order) {
        const int64_t at = vector;
        vector += vectors_of(width_);
        if (at >= mine.begin && at < mine.end) run_tiles(stop, {0, tiles_});
      }
    }
  }

 private:
  const Gemm& g_;
  const KernelTable& table_;
  const LayerWork& work_;
  const Member& me_;
  const Tiling tiling_;
  GemmArgs args_{};
  // The panels at hand.
  TileWidth width_ = kOnePanel;
  int tiles_ = 0;       // of rows
  int channel_ = 0;     // the first one
  int64_t offset_ = 0;  // of that channel in the destination
  int64_t step_bytes_ = 0;

  void begin_panel(int panel) {
    width_ = panel < g_.panels ? tiling_.widest : kOneVector;
    while (panels_of(width_) > std::max(1, g_.panels - panel)) width_ = TileWidth(width_ - 1);
    tiles_ = (work_.rows + table_.max_rows[width_] - 1) / table_.max_rows[width_];
    channel_ = panel * 2 * table_.lanes;
    const int unit_channels = work_.epilogue == Epilogue::kRaw ? kUnitFloats : table_.unit_channels;
    offset_ = (channel_ / unit_channels) * args_.destination_unit_stride +
              (channel_ % unit_channels) * (kUnitBytes / unit_channels);
    args_.matrix_stride = width_ == kOneVector ? g_.tail_matrix_stride : g_.matrix_stride;
    args_.weights = g_.panel(panel);
    step_bytes_ = (width_ == kOneVector ? 1 : 2) * table_.lanes * 4;
  }

  const Tap* taps_of(int position) const { return g_.taps.items.data() + g_.taps.begin[size_t(position)]; }

  // The panels at hand at one stop of the order, which is a position or one and its twin.
  void run_tiles(const Stop& stop, Range tiles) {
    const bool together = tiling_.twins && stop.twin >= 0 && 2 * work_.rows <= table_.max_rows[width_];
    const float calls = stop.twin >= 0 && !together ? 2 : 1;
    if (tiling_.fetches_ahead) {
      args_.ahead = args_.weights + stop.ahead_step * step_bytes_;
      args_.ahead_advance = int64_t(stop.ahead_rate / calls * float(step_bytes_ * kUnitFloats));
    }
    if (together) {
      args_.twin_taps = taps_of(stop.twin);
      args_.twin_destination = work_.destination + offset_ + int64_t(stop.twin) * work_.rows * kUnitBytes;
    }
    for (const int position : {stop.position, stop.twin}) {
      if (position < 0) continue;
      args_.taps = taps_of(position);
      args_.tap_count = g_.taps.count(position);
      args_.bias = g_.bias.empty() ? nullptr : g_.bias.data() + position * g_.bias_position_stride + channel_;
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) run_tile(position, int(tile), together);
      if (together) {
        finish_rows(stop.twin, 0, work_.rows);
        break;
      }
      if (tiling_.fetches_ahead)
        args_.ahead += args_.ahead_advance * args_.tap_count * units_of(args_.steps, kUnitFloats);
    }
  }

  void run_tile(int position, int tile, bool together) {
    const int rows = work_.rows;
    const int first = int(int64_t(rows) * tile / tiles_), last = int(int64_t(rows) * (tile + 1) / tiles_);
    args_.rows = last - first;
    args_.source = work_.source + int64_t(first) * kUnitBytes;
    args_.destination = work_.destination + offset_ + (int64_t(position) * rows + first) * kUnitBytes;
    (together ? table_.gemm_twins : table_.gemm)[int(work_.epilogue)][width_][args_.rows](args_);
    finish_rows(position, first, last);
  }

  void finish_rows(int position, int first, int last) const {
    const int64_t place = int64_t(position) * work_.rows;
    work_.finish(channel_, channel_ + vectors_of(width_) * table_.lanes, {place + first, place + last});
  }
};

// Where in a line whose positions are stored phase by phase the position x lies.
int phase_position(int x, int phases, int width) {
  int start = 0;
  for (int phase = 0; phase < x % phases; ++phase) start += (width - phase + phases - 1) / phases;
  return start + x / phases;
}

// Tap after tap over rectangles of positions. Threads share panels, and the lines of positions where panels do not divide.
class TapSchedule {
 public:
  TapSchedule(const Gemm& gemm, const LayerWork& work, const Member& me)
      : g_(gemm),
        table_(*gemm.table),
        work_(work),
        me_(me),
        runs_(*gemm.tap_runs),
        width_(runs_.destination_width),
        unit_bytes_(int64_t(g_.destination_positions) * kUnitBytes) {
    args_.steps = g_.steps;
    args_.unit_stride = int64_t(g_.source_positions) * kUnitBytes;
    args_.destination_unit_stride = unit_bytes_;
  }

  void my_tiles() {
    const int panels = g_.panels + g_.tail, height = g_.destination_positions / width_;
    const int slices = panels % me_.size == 0 ? 1 : std::min(me_.size, height);
    const Range mine = me_.share(int64_t(panels) * slices);
    for (int item = int(mine.begin); item < mine.end; ++item) {
      const int panel = item / slices, slice = item % slices;
      begin_panel(panel, height * slice / slices, height * (slice + 1) / slices);
      start_sums();
      for (const Run& v : runs_.vertical) {
        // The run's lines that fall into this slice.
        const auto before = [&v](int y) {
          return y <= v.destination ? 0 : (y - v.destination + v.destination_step - 1) / v.destination_step;
        };
        const Range lines{before(line_begin_), std::min(before(line_end_), v.count)};
        if (lines.begin >= lines.end) continue;
        for (const Run& h : runs_.horizontal) run_tap(panel, v, h, lines);
      }
      work_.finish(channel_, channel_ + channels_, {int64_t(line_begin_) * width_, int64_t(line_end_) * width_});
    }
  }

 private:
  const Gemm& g_;
  const KernelTable& table_;
  const LayerWork& work_;
  const Member& me_;
  const TapRuns& runs_;
  const int width_;  // of the destination, in positions
  const int64_t unit_bytes_;
  TapArgs args_{};
  // The panel and the lines of positions at hand.
  TileWidth panel_width_ = kOnePanel;
  int channel_ = 0, channels_ = 0, line_begin_ = 0, line_end_ = 0;
  int64_t matrix_stride_ = 0;
  int source_start_ = 0;  // of the tap's positions in a line of the source

  void begin_panel(int panel, int line_begin, int line_end) {
    panel_width_ = panel < g_.panels ? kOnePanel : kOneVector;
    channel_ = panel * 2 * table_.lanes;
    channels_ = vectors_of(panel_width_) * table_.lanes;
    matrix_stride_ = panel_width_ == kOneVector ? g_.tail_matrix_stride : g_.matrix_stride;
    line_begin_ = line_begin;
    line_end_ = line_end;
  }

  char* sums_of(int channel) const {
    return work_.destination + (channel / kUnitFloats) * unit_bytes_ + (channel % kUnitFloats) * 4;
  }

  void start_sums() const {
    for (int c = channel_; c < channel_ + channels_; c += table_.lanes) {
      char* const sums = sums_of(c);
      for (int p = line_begin_ * width_; p < line_end_ * width_; ++p) {
        if (g_.bias.empty())
          std::memset(sums + int64_t(p) * kUnitBytes, 0, size_t(table_.lanes) * 4);
        else
          std::memcpy(sums + int64_t(p) * kUnitBytes, g_.bias.data() + p * g_.bias_position_stride + c,
                      size_t(table_.lanes) * 4);
      }
    }
  }

  // One tap over the given lines of its valid rectangle.
  void run_tap(int panel, const Run& v, const Run& h, Range lines) {
    const int first = int(lines.begin), count = int(lines.end - lines.begin);
    args_.weights = g_.panel(panel) + (v.set * runs_.horizontal_sets + h.set) * matrix_stride_;
    args_.destination_step = int64_t(h.destination_step) * kUnitBytes;
    source_start_ = phase_position(h.source, runs_.phases, runs_.source_width);
    // The next matrix is fetched while this one is used, which takes about so many tiles.
    const int64_t tiles = int64_t(h.count) * count / table_.max_positions + 1;
    args_.ahead = args_.weights + matrix_stride_;
    args_.ahead_advance = channels_ * 4 / tiles;
    const int pieces = (h.count + table_.max_segment - 1) / table_.max_segment;
    for (int piece = 0; piece < pieces; ++piece) {
      const int x0 = h.count * piece / pieces, x1 = h.count * (piece + 1) / pieces;
      const int tall = std::max(1, std::min(table_.max_segments, table_.max_positions / (x1 - x0)));
      const int bands = (count + tall - 1) / tall;
      for (int band = 0; band < bands; ++band)
        run_tile(v, h, {first + count * band / bands, first + count * (band + 1) / bands}, {x0, x1});
    }
  }

  // The segments [x.begin, x.end) of some lines.
  void run_tile(const Run& v, const Run& h, Range lines, Range x) {
    char* const destination = sums_of(channel_);
    const int64_t from = source_start_ + x.begin;
    const int64_t to = h.destination + x.begin * h.destination_step;
    const int segments = int(lines.end - lines.begin), positions = int(x.end - x.begin);
    for (int s = 0; s < segments; ++s) {
      const int64_t line = lines.begin + s;
      const int64_t sy = v.source + line * v.source_step, dy = v.destination + line * v.destination_step;
      args_.source[s] = work_.source + (sy * runs_.source_width + from) * kUnitBytes;
      args_.destination[s] = destination + (dy * width_ + to) * kUnitBytes;
    }
    args_.positions = positions;
    table_.tap[panel_width_][segments][positions](args_);
    args_.ahead += args_.ahead_advance * args_.steps;
  }
};

int64_t latent_sums_stride(const Gemm& g, int rows) { return buffer_bytes({g.source_channels, 1, 1}, rows) / 4; }

}  // namespace

void row_schedule(const Gemm& gemm, const LayerWork& work, const Member& me) { RowSchedule(gemm, work, me).my_tiles(); }

void tap_schedule(const Gemm& gemm, const LayerWork& work, const Member& me) { TapSchedule(gemm, work, me).my_tiles(); }

// A member's share are those panels that it reads in the forward pass, or nearly so, and it ends with those that it will
// begin with there: they are still in its cache.
void sum_latent_panels(const Gemm& g, const char* source, int rows, float* sums, const Member& me) {
  const KernelTable& table = *g.table;
  const int tiles = (rows + table.max_latent_rows - 1) / table.max_latent_rows;
  const int64_t units = units_of(g.source_channels, kUnitFloats);
  const int unit_steps = kUnitFloats * kUnitFloats / table.unit_channels;
  LatentArgs args{};
  args.position_stride = int64_t(rows) * kUnitBytes;
  args.unit_stride = int64_t(g.destination_positions) * rows * kUnitBytes;
  args.taps = g.latent_gradient->taps.data();
  args.tap_count = int(g.latent_gradient->taps.size());
  const Range mine = me.share((g.panels + g.tail) * units);  // of all panels' units
  for (int panel = g.panels + g.tail; panel-- > 0;) {
    const TileWidth width = panel < g.panels ? kOnePanel : kOneVector;
    const int channel = panel * 2 * table.lanes;
    args.matrix_stride = width == kOneVector ? g.tail_matrix_stride : g.matrix_stride;
    const int64_t first = panel * units;
    for (int64_t item = std::max(mine.begin, first); item < std::min(mine.end, first + units); ++item) {
      const int unit = int(item - first);
      args.weights = g.panel(panel) + int64_t(unit) * unit_steps * vectors_of(width) * table.lanes * 4;
      args.steps = std::min(unit_steps, g.steps - unit * unit_steps);
      for (int tile = 0; tile < tiles; ++tile) {
        const int r0 = rows * tile / tiles, r1 = rows * (tile + 1) / tiles;
        args.source = source + (channel / table.unit_channels) * args.unit_stride + int64_t(r0) * kUnitBytes +
                      (channel % table.unit_channels) * (kUnitBytes / table.unit_channels);
        args.sums = sums + panel * latent_sums_stride(g, rows) + (int64_t(unit) * rows + r0) * kUnitFloats;
        table.latent[width][r1 - r0](args);
      }
    }
  }
}

void add_latent_panels(const Gemm& g, const float* sums, int rows, Range units, float* gradient) {
  const int64_t first = units.begin * rows * kUnitFloats, count = (units.end - units.begin) * rows * kUnitFloats;
  float* const total = gradient + first;
  const float* part = sums + first;
  std::copy_n(part, count, total);
  for (int panel = 1; panel < g.panels + g.tail; ++panel) {
    part += latent_sums_stride(g, rows);
    for (int64_t i = 0; i < count; ++i) total[i] += part[i];
  }
}

}  // namespace defgan::cpu
