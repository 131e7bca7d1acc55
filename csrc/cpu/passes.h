// The generator's passes over a group of rows: forward from the latent to the image, backward from the image's gradient
// to the latent's. All members of a team call the same functions in the same order; each does its share of every layer,
// and they meet between layers.
//
// A stored activation is overwritten by its gradient where the group has several rows. A single row's gradients go to
// buffers of their own, in the order of positions that the next layer down reads contiguously.
#pragma once

#include "schedules.h"
#include "stopwatch.h"
#include "workspace.h"

namespace defgan::cpu {

class Passes {
 public:
  // asks: the call's interruption in the thread that asks for it, null in all others.
  Passes(const PackedGenerator& generator, Workspace& workspace, const Member& member, Interruption* asks,
         Profile* profile)
      : g_(generator),
        w_(workspace),
        me_(member),
        asks_(asks),
        image_(*generator.set->image),
        watch_(profile, generator.layers.size()) {}

  // The following calls are for a group of so many rows, for which the workspace has been prepared.
  void begin(int rows) { rows_ = rows; }

  // `g` below is the generator itself or its float32 form.

  // Stores this member's share of the latent as the first layer reads it.
  void store_latent(const PackedGenerator& g);

  // The stored latent -> the image. On return every member has its own pixels; nobody has met yet.
  void forward(const PackedGenerator& g);

  // The image and the target -> the gradient of the error with respect to the last layer's sums.
  void image_gradient();

  // That gradient -> the latent's, of which every member has its own units; nobody has met yet.
  void backward();

  // One momentum step of this member's units of the latent.
  void update(float rate, float momentum);

  // Scales every row's latent, of which each member has its own units, to the norm `radius`; a row of norm zero stays.
  void scale_latent(float radius);

  void meet() {
    if (asks_) asks_->ask(g_.set->bfloat16->release);
    me_.meet();
    watch_.waiting();
  }

  Stopwatch& watch() { return watch_; }

 private:
  const PackedGenerator& g_;
  Workspace& w_;
  const Member& me_;
  Interruption* const asks_;
  const ImageKernels& image_;
  Stopwatch watch_;
  int rows_ = 0;

  Range latent_units() const { return me_.share(units_of(g_.plan.latent_size(), kUnitFloats)); }
  ImageArgs image_args(const PackedGenerator& g) const;
  void forward_layer(const PackedGenerator& g, size_t n, const char* source);
  void last_layer_forward(const PackedGenerator& g, const char* source);
  void map_forward(const KernelTable& table, const PackedLayer& p, const char* source, char* stored,
                   Activation activation, float slope) const;
  void reorder_forward(const KernelTable& table, const PackedLayer& p, const char* source, char* stored) const;
  void backward_layer(size_t n);
  void pass_gradient(const PackedLayer& p, const KernelTable& table, const LayerWork& work) const;
  void narrow_gradient(size_t n);
};

}  // namespace defgan::cpu
