// Parsing of plans: what is well-formed is read as written, everything else is one clear error and never a crash.
#include <stdexcept>
#include <string>

#include "../geometry.h"
#include "check.h"

using namespace defgan;

namespace {

const char* const kGood =
    "linear in=8x1x1 out=6x2x2 activation=relu weight=0 bias=1\n"
    "conv_transpose in=6x2x2 out=3x5x4 kernel=3x2 stride=2x2 pad=0x0 activation=leaky_relu slope=0.2 weight=2 bias=-1 "
    "eps=1e-05 norm=3,4,5,6\n"
    "map in=3x5x4 out=3x10x8 upsample=2x2\n"
    "conv in=3x10x8 out=1x10x8 kernel=3x3 stride=1x1 pad=1x1 activation=tanh weight=7 bias=8\n"
    "image out=1x10x8\n";

void rejects(const std::string& text, const char* part) {
  try {
    parse_plan(text);
    CHECK(false, "accepted: %s", text.c_str());
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find(part) != std::string::npos, "message '%s' lacks '%s'", error.what(), part);
  }
}

// Every prefix and every single changed byte is either a plan or an error.
void survives_damage() {
  const std::string good = kGood;
  for (size_t n = 0; n <= good.size(); ++n)
    for (const char c : {'\0', '9', '-', 'x', '\n'}) {
      std::string damaged = good.substr(0, n);
      if (n < good.size()) damaged += c + good.substr(n + 1);
      try {
        const Plan plan = parse_plan(damaged);
        for (const Layer& l : plan.layers)
          if (l.in.elements() * l.out.elements() < 1000000 && l.has_matrix()) links_of(l);
      } catch (const std::invalid_argument&) {
      }
    }
}

}  // namespace

int main() {
  const Plan plan = parse_plan(kGood);
  CHECK(plan.layers.size() == 4, "%zu layers", plan.layers.size());
  CHECK(plan.latent_size() == 8, "%d", plan.latent_size());
  CHECK(plan.layers[1].norm.weight == 5 && plan.layers[1].norm.eps > 0.9e-5, "norm");
  CHECK(plan.layers[1].slope > 0.19f, "slope");
  // The linear layer, 8 -> 24; 6 x 4 links of 6 -> 3 channels; 28 x 22 links of the padded convolution, 3 -> 1 channels.
  CHECK(multiply_adds(plan) == 8 * 24 + 6 * 4 * 18 + 28 * 22 * 3, "%d", int(multiply_adds(plan)));

  rejects("", "no layers");
  rejects("pool in=1x1x1 out=1x1x1", "unknown kind");
  rejects("linear in=8x1x1 out=4x1x1", "weight");
  // 65536 * 65535 is more than an int holds.
  rejects("conv_transpose in=1x1x1 out=1x65536x1 kernel=1x1 stride=65536x1 weight=0",
          "stride or upsample out of range");
  rejects("map in=1x1x1 out=1x65536x1 upsample=65536x1\nmap in=1x65536x1 out=1x1x1 upsample=65536x1",
          "layer 1: stride or upsample out of range");
  rejects("linear in=8x1x1 out=4x1x1 weight=0 colour=3", "unknown key");
  rejects("linear in=8x1x1 out=4x1x1 weight=zero", "integer");
  rejects("linear in=8x2x1 out=4x1x1 weight=0", "one position");
  rejects("linear in=8x1x1 out=4x1x1 weight=0\nlinear in=5x1x1 out=4x1x1 weight=1", "not the output");
  rejects("linear in=8x1x1 out=4x1x1 weight=0 activation=leaky_relu slope=-1", "slope");
  rejects("linear in=8x1x1 out=99999999x1x1 weight=0", "out of range");
  rejects("linear in=8x1x1 out=4x1x1 weight=0\nmap in=4x1x1 out=4x3x3", "outside");
  rejects("linear in=8x1x1 out=4x1x1 weight=0\nreorder in=4x1x1 out=3x1x1", "keeps the elements");
  rejects("linear in=8x1x1 out=4x1x1 weight=0\nimage out=5x1x1", "image");
  rejects("linear in=8x1x1 out=4x4x4 weight=0\nconv_transpose in=4x4x4 out=4x4x4 kernel=3x3 stride=0x1 weight=1",
          "stride");
  rejects(
      "linear in=8x1x1 out=65536x1x1 weight=0\n"
      "conv_transpose in=65536x1x1 out=65536x1x1 kernel=65536x65536 weight=1",
      "kernel out of range");

  try {
    check_parameters(plan, {8 * 24, 24, 6 * 3 * 6, 3, 3, 3, 3, 27, 2});
    CHECK(false, "a bias of the wrong size was accepted");
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("bias must have 1 elements, got 2") != std::string::npos, "%s", error.what());
  }
  check_parameters(plan, {8 * 24, 24, 6 * 3 * 6, 3, 3, 3, 3, 27, 1});
  survives_damage();
  return report("test_plan");
}
