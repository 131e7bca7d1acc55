#include "plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <locale>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace defgan {
namespace {

[[noreturn]] void fail(size_t layer, const std::string& what) {
  throw std::invalid_argument("plan, layer " + std::to_string(layer) + ": " + what);
}

// Bounds that keep every later product inside int and a hostile plan from asking for absurd memory.
constexpr int kMaxExtent = 1 << 16;
constexpr int64_t kMaxElements = int64_t(1) << 26;
constexpr double kMaxWeightElements = 1e15;
constexpr size_t kMaxLayers = 1000;
// Of a stride or an upsampling times a position, to which a kernel and a padding are added.
constexpr int64_t kMaxReach = int64_t(1) << 30;

int parse_int(size_t layer, const std::string& text) {
  size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size()) fail(layer, "expected an integer, got '" + text + "'");
  return value;
}

std::vector<int> parse_ints(size_t layer, const std::string& text, char separator, size_t count) {
  std::vector<int> values;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) values.push_back(parse_int(layer, part));
  if (values.size() != count) fail(layer, "expected " + std::to_string(count) + " integers, got '" + text + "'");
  return values;
}

// Reads a number as in the classic locale, whatever the process's is, on which std::strtod and std::stod depend. A stream
// serves only where there is no std::from_chars: with PyTorch 2.11 for CUDA 13 in the process, reading a number from one
// crashed, and why was not found.
double parse_double(size_t layer, const std::string& text) {
  double value = 0;
#ifdef __cpp_lib_to_chars
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = status == std::errc() && end == text.data() + text.size();
#else
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  const bool whole = stream >> value && stream.eof();
#endif
  if (!whole || !std::isfinite(value)) fail(layer, "expected a number, got '" + text + "'");
  return value;
}

Shape parse_shape(size_t layer, const std::string& text) {
  const auto v = parse_ints(layer, text, 'x', 3);
  const Shape shape{v[0], v[1], v[2]};
  for (int extent : v)
    if (extent < 1 || extent > (1 << 24)) fail(layer, "shape out of range: " + text);
  if (shape.h > kMaxExtent || shape.w > kMaxExtent || double(v[0]) * v[1] * v[2] > double(kMaxElements))
    fail(layer, "shape out of range: " + text);
  return shape;
}

Pair parse_pair(size_t layer, const std::string& text) {
  const auto v = parse_ints(layer, text, 'x', 2);
  return {v[0], v[1]};
}

const std::map<std::string, Kind> kKinds = {{"linear", Kind::kLinear},
                                            {"conv_transpose", Kind::kConvTranspose},
                                            {"conv", Kind::kConv},
                                            {"map", Kind::kMap},
                                            {"reorder", Kind::kReorder}};
const std::map<std::string, Activation> kActivations = {{"identity", Activation::kIdentity},
                                                        {"relu", Activation::kRelu},
                                                        {"leaky_relu", Activation::kLeakyRelu},
                                                        {"sigmoid", Activation::kSigmoid},
                                                        {"tanh", Activation::kTanh}};

void check_layer(size_t n, const Layer& l) {
  const auto between = [n](int value, int low, int high, const char* what) {
    if (value < low || value > high) fail(n, std::string(what) + " out of range: " + std::to_string(value));
  };
  for (int extent : {l.kernel.h, l.kernel.w}) between(extent, 0, kMaxExtent, "kernel");
  for (int extent : {l.stride.h, l.stride.w, l.upsample.h, l.upsample.w})
    between(extent, 1, kMaxExtent, "stride or upsample");
  between(l.pad.h, -kMaxExtent, kMaxExtent, "pad");
  between(l.pad.w, -kMaxExtent, kMaxExtent, "pad");
  const auto reaches = [](int factor, int extent) { return int64_t(factor) * extent > kMaxReach; };
  if (reaches(l.stride.h, std::max(l.in.h, l.out.h)) || reaches(l.stride.w, std::max(l.in.w, l.out.w)) ||
      reaches(l.upsample.h, l.in.h) || reaches(l.upsample.w, l.in.w))
    fail(n, "stride or upsample out of range: times the extent it is more than " + std::to_string(kMaxReach));
  const bool conv = l.kind == Kind::kConv || l.kind == Kind::kConvTranspose;
  if (conv && (l.kernel.h < 1 || l.kernel.w < 1)) fail(n, "kernel out of range");
  if (double(l.kernel.h) * l.kernel.w * l.in.c * l.out.c > kMaxWeightElements) fail(n, "kernel out of range");
  if (l.has_matrix() != (l.weight >= 0)) fail(n, "weight given for a layer without one, or missing");
  if (!(l.slope >= 0)) fail(n, "slope must be at least 0");
  if (l.kind == Kind::kMap) {
    if (l.in.c != l.out.c) fail(n, "a map keeps the channels");
    if (l.pad.h < 0 || l.pad.w < 0) fail(n, "a map's crop starts inside its input");
    if ((l.out.h - 1 + l.pad.h) / l.upsample.h >= l.in.h || (l.out.w - 1 + l.pad.w) / l.upsample.w >= l.in.w)
      fail(n, "a map reads outside its input");
  }
  if (l.kind == Kind::kReorder && l.in.elements() != l.out.elements()) fail(n, "a reorder keeps the elements");
}

// What a layer reads is what the one before it gives.
void check_input(size_t n, const Plan& plan, const Layer& layer) {
  if (plan.layers.empty()) {
    if (layer.in.positions() != 1) fail(n, "the latent has one position");
    return;
  }
  const Shape& before = plan.layers.back().out;
  if (before.c != layer.in.c || before.h != layer.in.h || before.w != layer.in.w)
    fail(n, "its input is not the output of the layer before");
}

void set_attribute(size_t n, Layer& layer, const std::string& key, const std::string& value) {
  if (key == "in") {
    layer.in = parse_shape(n, value);
  } else if (key == "out") {
    layer.out = parse_shape(n, value);
  } else if (key == "kernel") {
    layer.kernel = parse_pair(n, value);
  } else if (key == "stride") {
    layer.stride = parse_pair(n, value);
  } else if (key == "pad") {
    layer.pad = parse_pair(n, value);
  } else if (key == "upsample") {
    layer.upsample = parse_pair(n, value);
  } else if (key == "weight") {
    layer.weight = parse_int(n, value);
  } else if (key == "bias") {
    layer.bias = parse_int(n, value);
  } else if (key == "slope") {
    layer.slope = float(parse_double(n, value));
  } else if (key == "eps") {
    layer.norm.eps = parse_double(n, value);
  } else if (key == "norm") {
    const std::vector<int> v = parse_ints(n, value, ',', 4);
    layer.norm = {v[0], v[1], v[2], v[3], layer.norm.eps};
  } else if (key == "activation") {
    const auto found = kActivations.find(value);
    if (found == kActivations.end()) fail(n, "unknown activation '" + value + "'");
    layer.activation = found->second;
  } else {
    fail(n, "unknown key '" + key + "'");
  }
}

Layer parse_layer(size_t n, const std::string& kind, std::istream& words) {
  const auto known = kKinds.find(kind);
  if (known == kKinds.end()) fail(n, "unknown kind '" + kind + "'");
  Layer layer;
  layer.kind = known->second;
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) fail(n, "expected key=value, got '" + word + "'");
    set_attribute(n, layer, word.substr(0, equals), word.substr(equals + 1));
  }
  if (layer.in.c == 0 || layer.out.c == 0) fail(n, "in and out shapes are required");
  return layer;
}

Shape parse_image(size_t n, std::istream& words) {
  std::string word;
  if (!(words >> word) || word.compare(0, 4, "out=") != 0) fail(n, "expected image out=CxHxW");
  return parse_shape(n, word.substr(4));
}

}  // namespace

const char* name_of(Kind kind) {
  for (const auto& entry : kKinds)
    if (entry.second == kind) return entry.first.c_str();
  return "?";
}

const char* name_of(Activation activation) {
  for (const auto& entry : kActivations)
    if (entry.second == activation) return entry.first.c_str();
  return "?";
}

Plan parse_plan(const std::string& text) {
  Plan plan;
  std::stringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    const size_t n = plan.layers.size();
    if (n >= kMaxLayers) fail(n, "more than " + std::to_string(kMaxLayers) + " layers");
    if (plan.image.c != 0) fail(n, "the image's shape comes last");
    std::stringstream words(line);
    std::string word;
    words >> word;
    if (word == "image") {
      plan.image = parse_image(n, words);
    } else {
      const Layer layer = parse_layer(n, word, words);
      check_input(n, plan, layer);
      check_layer(n, layer);
      plan.layers.push_back(layer);
    }
  }
  if (plan.layers.empty()) throw std::invalid_argument("plan: no layers");
  if (plan.image.c == 0) plan.image = plan.layers.back().out;
  if (plan.image.elements() != plan.layers.back().out.elements())
    throw std::invalid_argument("plan: the image's shape does not hold the last layer's elements");
  return plan;
}

bool norm_is_per_element(const Layer& layer, const std::vector<int64_t>& elements) {
  const int mean = layer.norm.mean;
  return layer.norm.present() && layer.out.positions() > 1 && mean < int(elements.size()) &&
         elements[size_t(mean)] == layer.out.elements();
}

void check_parameters(const Plan& plan, const std::vector<int64_t>& elements) {
  for (size_t n = 0; n < plan.layers.size(); ++n) {
    const Layer& l = plan.layers[n];
    const auto expect = [&](int index, int64_t count, const char* what) {
      if (index < 0) return;
      if (index >= int(elements.size())) fail(n, std::string(what) + " names a parameter that was not given");
      if (elements[size_t(index)] != count)
        fail(n, std::string(what) + " must have " + std::to_string(count) + " elements, got " +
                    std::to_string(elements[size_t(index)]));
    };
    expect(l.weight, l.weight_elements(), "weight");
    expect(l.bias, l.kind == Kind::kLinear ? l.out.elements() : l.out.c, "bias");
    if (!l.norm.present()) continue;
    if (l.norm.var < 0) fail(n, "norm without variance");
    const bool per_element = norm_is_per_element(l, elements);
    if (per_element && l.kind != Kind::kLinear && (l.kind != Kind::kMap || l.in.positions() != l.out.positions()))
      fail(n, "a norm per element belongs to a linear layer or a plain affine map");
    const int64_t count = per_element ? l.out.elements() : l.out.c;
    expect(l.norm.mean, count, "norm mean");
    expect(l.norm.var, count, "norm variance");
    expect(l.norm.weight, count, "norm weight");
    expect(l.norm.bias, count, "norm bias");
  }
}

}  // namespace defgan
