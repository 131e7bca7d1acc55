// The geometry against the definitions of the layers: outputs that are summed tap by tap, with weights where the addresses
// say that they are, equal those of nested loops over the rule o = stride * i + k - pad.
#include "../geometry.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "check.h"

using namespace defgan;

namespace {

using Numbers = std::vector<double>;

Numbers random_numbers(int64_t count, std::mt19937& random) {
  std::uniform_int_distribution<int> whole(-8, 8);  // sums of products of these are exact in any order
  Numbers values(static_cast<size_t>(count));
  for (double& v : values) v = whole(random);
  return values;
}

// The layer's weight for an input and an output element, by its definition; 0 where they are not linked.
double weight_between(const Layer& l, const Numbers& weight, int ci, int iy, int ix, int co, int oy, int ox) {
  if (l.kind == Kind::kLinear) {
    const int64_t in = (int64_t(ci) * l.in.h + iy) * l.in.w + ix, out = (int64_t(co) * l.out.h + oy) * l.out.w + ox;
    return weight[size_t(out * l.in.elements() + in)];
  }
  double sum = 0;
  for (int ky = 0; ky < l.kernel.h; ++ky)
    for (int kx = 0; kx < l.kernel.w; ++kx) {
      if (l.kind == Kind::kConvTranspose) {
        if (oy != l.stride.h * iy + ky - l.pad.h || ox != l.stride.w * ix + kx - l.pad.w) continue;
        sum += weight[size_t(((ci * l.out.c + co) * l.kernel.h + ky) * l.kernel.w + kx)];
      } else {
        const int uy = l.stride.h * oy + ky - l.pad.h, ux = l.stride.w * ox + kx - l.pad.w;
        if (uy < 0 || ux < 0 || uy / l.upsample.h != iy || ux / l.upsample.w != ix) continue;
        sum += weight[size_t(((co * l.in.c + ci) * l.kernel.h + ky) * l.kernel.w + kx)];
      }
    }
  return sum;
}

// The element of a matrix, from the addresses.
double matrix_element(const Layer& l, const Numbers& weight, const LayerLinks& links, int matrix, int ci, int co) {
  const ParameterAddresses at(l, {int64_t(weight.size())});
  const size_t across = links.horizontal.sets.size();
  double sum = 0;
  for (const int ky : links.vertical.sets[size_t(matrix) / across])
    for (const int kx : links.horizontal.sets[size_t(matrix) % across])
      sum += weight[size_t(at.weight_of(ky, kx) + ci * at.step_in + co * at.step_out)];
  return sum;
}

int rank_of(const Tap& tap, int width, const TapOrder& order) {
  return phase_of(tap.source, width, order.source_phases);
}

void check_taps(const Layer& l, const Numbers& weight, Direction direction, const TapOrder& order, const char* name) {
  const LayerLinks links = links_of(l);
  const Lists<Tap> taps = taps_of(l, links, direction, order);
  const bool backward = direction == Direction::kBackward;
  const Shape &from = backward ? l.out : l.in, &to = backward ? l.in : l.out;
  CHECK(int(taps.begin.size()) == to.positions() + 1, "%s: lists", name);
  for (int d = 0; d < to.positions(); ++d) {
    for (int cs = 0; cs < from.c; ++cs)
      for (int cd = 0; cd < to.c; ++cd)
        for (int s = 0; s < from.positions(); ++s) {
          double through_taps = 0;
          for (int t = taps.begin[size_t(d)]; t < taps.begin[size_t(d) + 1]; ++t) {
            const Tap& tap = taps.items[size_t(t)];
            if (tap.source != s) continue;
            through_taps += matrix_element(l, weight, links, tap.matrix, backward ? cd : cs, backward ? cs : cd);
          }
          const int in = backward ? d : s, out = backward ? s : d;
          const double expected = weight_between(l, weight, backward ? cd : cs, in / l.in.w, in % l.in.w,
                                                 backward ? cs : cd, out / l.out.w, out % l.out.w);
          CHECK(through_taps == expected, "%s: position %d from %d: %g, not %g", name, d, s, through_taps, expected);
        }
    for (int t = taps.begin[size_t(d)] + 1; t < taps.begin[size_t(d) + 1]; ++t) {
      const Tap &before = taps.items[size_t(t) - 1], &tap = taps.items[size_t(t)];
      const int phase_before = rank_of(before, from.w, order), phase = rank_of(tap, from.w, order);
      const bool by_matrix = order.within == TapOrder::Within::kByMatrix;
      const bool rises = by_matrix
                             ? before.matrix < tap.matrix || (before.matrix == tap.matrix && before.source < tap.source)
                             : before.source < tap.source;
      CHECK(phase_before < phase || (phase_before == phase && rises), "%s: the order at position %d", name, d);
    }
  }
}

void check_phases(const Layer& l, const char* name) {
  for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
    const Shape& to = direction == Direction::kBackward ? l.in : l.out;
    std::vector<int> seen;
    for (const std::vector<int>& phase : positions_by_phase(to, phases_of(l, direction))) {
      CHECK(!phase.empty() && std::is_sorted(phase.begin(), phase.end()), "%s: a phase", name);
      for (const int p : phase)
        CHECK(phase_of(p, to.w, phases_of(l, direction)) == phase_of(phase[0], to.w, phases_of(l, direction)),
              "%s: position %d is of another phase", name, p);
      seen.insert(seen.end(), phase.begin(), phase.end());
    }
    std::sort(seen.begin(), seen.end());
    CHECK(int(seen.size()) == to.positions(), "%s: %zu positions", name, seen.size());
    for (int p = 0; p < int(seen.size()); ++p) CHECK(seen[size_t(p)] == p, "%s: position %d", name, p);
  }
}

// The image's pixels from what the last layer leaves, as columns or not.
void check_image(const Plan& plan, const Numbers& weight, int channel_multiple, bool columns, const char* name) {
  const Layer& l = plan.layers.back();
  const ImageGeometry image = image_geometry_of(plan, channel_multiple, {{2, 2}, TapOrder::Within::kBySource});
  CHECK(image.columns == columns, "%s: columns", name);
  std::mt19937 random(7);
  const Numbers input = random_numbers(l.in.elements(), random);
  std::vector<int> readers(size_t(image.positions) * size_t(image.channels), 0);
  for (int pixel = 0; pixel < int(plan.image.elements()); ++pixel) {
    const int co = pixel / l.out.positions(), out = pixel % l.out.positions();
    double got = 0, expected = 0;
    for (int i = image.of_pixels.begin[size_t(pixel)]; i < image.of_pixels.begin[size_t(pixel) + 1]; ++i) {
      const ImageEntry& e = image.of_pixels.items[size_t(i)];
      ++readers[size_t(e.position) * size_t(image.channels) + size_t(e.channel)];
      if (!columns) {
        CHECK(e.position == out && e.channel == co, "%s: pixel %d", name, pixel);
        continue;
      }
      const int matrices = image.links.matrices();
      for (int ci = 0; ci < l.in.c; ++ci)
        got += input[size_t(ci * l.in.positions() + e.position)] *
               matrix_element(l, weight, image.links, e.channel % matrices, ci, e.channel / matrices);
    }
    for (int ci = 0; columns && ci < l.in.c; ++ci)
      for (int in = 0; in < l.in.positions(); ++in)
        expected += input[size_t(ci * l.in.positions() + in)] *
                    weight_between(l, weight, ci, in / l.in.w, in % l.in.w, co, out / l.out.w, out % l.out.w);
    CHECK(got == expected, "%s: pixel %d: %g, not %g", name, pixel, got, expected);
  }
  for (const int count : readers) CHECK(count <= 1, "%s: an element of %d pixels", name, count);
}

void check_layer(const std::string& text, const char* name) {
  const Layer l =
      parse_plan("linear in=1x1x1 out=" + text.substr(text.find("in=") + 3, text.find(" out=") - text.find("in=") - 3) +
                 " weight=0\n" + text)
          .layers.back();
  std::mt19937 random(3);
  const int64_t elements = l.kind == Kind::kLinear ? l.in.elements() * l.out.elements()
                                                   : int64_t(l.kernel.h) * l.kernel.w * l.in.c * l.out.c;
  const Numbers weight = random_numbers(elements, random);
  for (const Direction direction : {Direction::kForward, Direction::kBackward})
    for (const TapOrder& order :
         {TapOrder{}, TapOrder{{2, 3}, TapOrder::Within::kByMatrix}, TapOrder{{2, 2}, TapOrder::Within::kBySource}})
      check_taps(l, weight, direction, order, name);
  check_phases(l, name);
}

void check_last_layers() {
  std::mt19937 random(5);
  const Plan few = parse_plan(
      "linear in=2x1x1 out=3x4x4 weight=0\n"
      "conv_transpose in=3x4x4 out=1x8x8 kernel=5x5 stride=2x2 pad=2x2 weight=0\n");
  check_image(few, random_numbers(75, random), 16, true, "one channel");
  check_image(few, random_numbers(75, random), 1, false, "one channel at a time");
  const Plan many = parse_plan(
      "linear in=2x1x1 out=3x4x4 weight=0\n"
      "conv_transpose in=3x4x4 out=33x8x8 kernel=3x3 stride=2x2 pad=1x1 weight=0\n");
  check_image(many, random_numbers(3 * 33 * 9, random), 32, true, "many channels");
  check_image(many, random_numbers(3 * 33 * 9, random), 1, false, "many channels at a time");
  check_image(parse_plan("linear in=2x1x1 out=3x4x4 weight=0\n"), random_numbers(96, random), 16, false, "linear");
}

void check_map() {
  const Layer l =
      parse_plan("linear in=1x1x1 out=2x3x4 weight=0\nmap in=2x3x4 out=2x4x5 upsample=2x2 pad=1x2\n").layers[1];
  const MapTable table = map_table_of(l);
  for (int o = 0; o < l.out.positions(); ++o)
    CHECK(table.from[size_t(o)] == (o / 5 + 1) / 2 * 4 + (o % 5 + 2) / 2, "map from %d", table.from[size_t(o)]);
  int readers = 0;
  for (int i = 0; i < l.in.positions(); ++i)
    for (int at = table.readers.begin[size_t(i)]; at < table.readers.begin[size_t(i) + 1]; ++at, ++readers)
      CHECK(table.from[size_t(table.readers.items[size_t(at)])] == i, "reader of %d", i);
  CHECK(readers == l.out.positions(), "%d readers", readers);
}

void check_addresses() {
  const Plan plan = parse_plan(
      "linear in=2x1x1 out=3x4x5 weight=0 bias=1 eps=1e-05 norm=2,2,-1,-1\n"
      "conv in=3x4x5 out=2x4x5 kernel=3x3 pad=1x1 weight=3 bias=4 eps=1e-05 norm=5,5,-1,-1\n");
  const std::vector<int64_t> per_element{2 * 60, 60, 60, 54, 2, 2}, per_channel{2 * 60, 60, 3, 54, 2, 2};
  const ParameterAddresses element(plan.layers[0], per_element), channel(plan.layers[0], per_channel);
  CHECK(element.norm_per_element && element.norm_of(7, 2) == 47, "%d", element.norm_of(7, 2));
  CHECK(!channel.norm_per_element && channel.norm_of(7, 2) == 2, "%d", channel.norm_of(7, 2));
  CHECK(channel.bias_per_position && channel.bias_of(7, 2) == 47, "%d", channel.bias_of(7, 2));
  const ParameterAddresses conv(plan.layers[1], per_element);
  CHECK(!conv.bias_per_position && !conv.norm_per_element && conv.bias_of(7, 1) == 1, "%d", conv.bias_of(7, 1));
}

}  // namespace

int main() {
  check_layer("linear in=3x1x1 out=2x3x2 weight=0", "linear onto a map");
  check_layer("linear in=3x2x2 out=2x2x3 weight=0", "linear from a map");
  check_layer("conv_transpose in=2x3x4 out=3x6x9 kernel=5x4 stride=2x3 pad=2x1 weight=0", "transposed");
  check_layer("conv_transpose in=2x2x3 out=2x9x2 kernel=2x3 stride=4x1 pad=0x1 weight=0", "wide stride");
  check_layer("conv in=2x5x6 out=3x3x3 kernel=3x3 stride=2x2 pad=1x1 weight=0", "strided convolution");
  check_layer("conv in=2x3x3 out=2x6x6 kernel=3x3 stride=1x1 pad=1x1 upsample=2x2 weight=0", "upsampled convolution");
  check_layer("conv in=2x2x2 out=1x7x6 kernel=2x1 stride=1x1 pad=0x0 upsample=4x3 weight=0", "wide upsampling");
  check_last_layers();
  check_map();
  check_addresses();
  return report("test_geometry");
}
