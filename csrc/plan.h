// The lowered generator: what the kernels know of a network, and nothing of torch.
//
// A plan is a chain of layers from the latent (k channels, one position) to the image. Every layer that multiplies by a
// matrix is described by which pairs of an input and an output position are linked, and by which weight matrix; borders,
// strides, crops and nearest upsampling are nothing but links that exist or do not. The text form (one layer a line,
// `key=value`; a last line `image out=CxHxW`) is what travels through the torch op, so that a graph that holds a
// projection can be printed and read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace defgan {

enum class Kind {
  kLinear,         // every input element to every output element
  kConvTranspose,  // o = stride * i + tap - pad
  kConv,           // i = (stride * o + tap - pad) / upsample, where the bracket is inside the upsampled input
  kMap,            // one source position an output position, channels kept: affine, nearest upsampling, crop
  kReorder,        // the same elements in (channel, y, x) order under another shape
};

// A new activation is added here, to kActivations in plan.cpp, and to defgan_fast/plan/activations.py; on CPUs to
// activated in cpu/elementwise.h, times_derivative in cpu/gather_gemm.h and is_transcendental in cpu/workspace.h; on GPUs
// to activate and differentiate in cuda/layout.h. Where it bounds its values, project_checks.h and candidate_pixels.h know that
// range. Its derivative must follow from its output, which is all that the kernels store.
enum class Activation { kIdentity, kRelu, kLeakyRelu, kSigmoid, kTanh };

struct Shape {
  int c = 0, h = 0, w = 0;
  int positions() const { return h * w; }
  int64_t elements() const { return int64_t(c) * h * w; }
};

struct Pair {
  int h = 0, w = 0;
};

// A batch normalisation, by indices into the list of parameter tensors; an index is -1 where there is no such tensor.
struct Norm {
  int mean = -1, var = -1, weight = -1, bias = -1;
  double eps = 0;
  bool present() const { return mean >= 0; }
};

struct Layer {
  Kind kind = Kind::kLinear;
  Shape in, out;
  Pair kernel, stride{1, 1}, pad, upsample{1, 1};
  Activation activation = Activation::kIdentity;
  float slope = 0;  // kLeakyRelu's, at least 0 so that the stored output tells the side of the kink
  int weight = -1, bias = -1;
  Norm norm;  // folded into weight and bias for layers with a matrix, the affine map itself for kMap

  int64_t weight_elements() const {
    return kind == Kind::kLinear ? in.elements() * out.elements() : int64_t(kernel.h) * kernel.w * in.c * out.c;
  }
  bool has_matrix() const { return kind == Kind::kLinear || kind == Kind::kConvTranspose || kind == Kind::kConv; }
};

struct Plan {
  std::vector<Layer> layers;
  Shape image;  // as the generator returns it; the last layer's output has the same elements in the same order
  int latent_size() const { return layers.front().in.c; }
};

// Throws std::invalid_argument with one line that names the layer and what is wrong.
Plan parse_plan(const std::string& text);

// Checks that every parameter index exists and has the number of elements that its layer needs.
void check_parameters(const Plan& plan, const std::vector<int64_t>& elements);

// Whether the layer's norm has a number for each element of its output (BatchNorm1d over features that are laid out in
// space), and not for each channel. elements: of every parameter tensor.
bool norm_is_per_element(const Layer& layer, const std::vector<int64_t>& elements);

const char* name_of(Kind kind);
const char* name_of(Activation activation);

}  // namespace defgan
