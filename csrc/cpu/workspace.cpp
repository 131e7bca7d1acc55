#include "workspace.h"

#include <algorithm>
#include <cstring>

namespace defgan::cpu {
namespace {

int64_t latent_sums_bytes(const PackedGenerator& g, int rows) {
  if (!takes_latent_gradient(g)) return 0;
  const Gemm& forward = g.layers[0].forward;
  return (forward.panels + forward.tail) * buffer_bytes({g.plan.latent_size(), 1, 1}, rows);
}

}  // namespace

bool takes_latent_gradient(const PackedGenerator& g) { return g.layers.front().forward.latent_gradient.has_value(); }

// A buffer is cleared where its padding may be read: what is written whole before it is read need not be.
enum class Padding { kNeverRead, kCleared };

template <class Use>
void Workspace::list(const PackedGenerator& g, int rows, const Use& use) {
  const Plan& plan = g.plan;
  const int k = plan.latent_size();
  const int64_t latent_bytes = int64_t(rows) * k * 4, latent_units = buffer_bytes({k, 1, 1}, rows);
  const int64_t image_bytes = int64_t(rows) * g.pixel_stride() * 4;
  const int positions = std::max(g.image_positions, g.float32().image_positions);
  const int units = std::max(g.image_units, g.float32().image_units);
  const int64_t column_bytes = int64_t(positions) * units * rows * kUnitBytes;
  use(latent, latent_bytes, Padding::kNeverRead);
  use(velocity, latent_bytes, Padding::kNeverRead);
  use(latent_squares, rows * units_of(k, kUnitFloats) * int64_t(sizeof(double)), Padding::kNeverRead);
  use(gradient, latent_units, Padding::kCleared);
  use(start_units, latent_units, Padding::kCleared);
  use(image, image_bytes, Padding::kNeverRead);
  use(target, image_bytes, Padding::kCleared);
  use(image_delta, image_bytes, Padding::kNeverRead);
  use(columns, column_bytes, Padding::kNeverRead);
  use(image_gradient, column_bytes, Padding::kCleared);
  use(wide, g.exact ? buffer_bytes(plan.layers.back().in, rows) : 0, Padding::kCleared);
  int64_t scratch_bytes = 0;
  stored.resize(plan.layers.size() - 1);
  delta.resize(plan.layers.size() - 1);
  for (size_t n = 0; n < stored.size(); ++n) {
    const Layer& l = plan.layers[n];
    use(stored[n], buffer_bytes(l.out, rows), Padding::kCleared);
    use(delta[n], buffer_bytes(l.out, 1), Padding::kCleared);
    scratch_bytes = std::max(scratch_bytes, buffer_bytes(l.out, is_transcendental(l.activation) ? rows : 1));
  }
  use(latent_sums, latent_sums_bytes(g, rows), Padding::kNeverRead);
  use(scratch, scratch_bytes, Padding::kCleared);
}

Workspace::Workspace(const PackedGenerator& generator, int capacity) {
  list(generator, capacity, [this](Buffer& buffer, int64_t bytes, Padding padding) {
    if (bytes == 0) return;
    buffer = Buffer(size_t(bytes));
    if (padding == Padding::kCleared) cleared_.push_back(&buffer);
  });
}

void Workspace::prepare(int rows, bool mixed) {
  if (rows == rows_ && !mixed) return;
  rows_ = rows;
  for (const Buffer* buffer : cleared_) std::memset(buffer->data(), 0, buffer->size());
}

int64_t workspace_bytes(const PackedGenerator& generator, int rows) {
  int64_t total = 0;
  Workspace().list(generator, rows, [&total](Buffer&, int64_t bytes, Padding) {
    if (bytes > 0) total += int64_t(Buffer::allocated_bytes(size_t(bytes)));
  });
  return total;
}

int64_t row_bytes(const PackedGenerator& generator) {
  const auto requested = [&](int rows) {
    int64_t total = 0;
    Workspace().list(generator, rows, [&total](Buffer&, int64_t bytes, Padding) { total += bytes; });
    return total;
  };
  return requested(2) - requested(1);
}

}  // namespace defgan::cpu
