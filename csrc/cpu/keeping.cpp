// Each leg is a projection of its own, of fewer rows, which goes on with the latents and velocities of the one before.
#include "keeping.h"

#include <algorithm>

namespace defgan::cpu {
namespace {

// The rows of a leg, those of each image side by side.
struct Rows {
  std::vector<int> restart;                // which of the call's restarts each row is
  std::vector<float> latents, velocities;  // [row][k]
};

// Copies line `from` of lines of k floats to line `to` of others.
void copy_line(const float* source, int64_t from, float* destination, int64_t to, int64_t k) {
  std::copy_n(source + from * k, k, destination + to * k);
}

// Those `rows` rows of each image that go on, in the order that they had.
Rows best_rows(const Rows& before, const std::vector<float>& errors, int rows_before, int rows, int64_t k) {
  const int64_t images = int64_t(errors.size()) / rows_before;
  Rows after{std::vector<int>(size_t(images * rows)), std::vector<float>(size_t(images * rows * k)),
             std::vector<float>(size_t(images * rows * k))};
  std::vector<int> order(static_cast<size_t>(rows_before));
  for (int64_t image = 0; image < images; ++image) {
    const float* e = errors.data() + image * rows_before;
    for (int i = 0; i < rows_before; ++i) order[size_t(i)] = i;
    std::sort(order.begin(), order.end(), [e](int a, int b) { return ranks_before(e[a], a, e[b], b); });
    std::sort(order.begin(), order.begin() + rows);
    for (int i = 0; i < rows; ++i) {
      const int64_t from = image * rows_before + order[size_t(i)], to = image * rows + i;
      after.restart[size_t(to)] = before.restart[size_t(from)];
      copy_line(before.latents.data(), from, after.latents.data(), to, k);
      copy_line(before.velocities.data(), from, after.velocities.data(), to, k);
    }
  }
  return after;
}

}  // namespace

void project_keeping(const PackedGenerator& generator, const ProjectArgs& args, const std::vector<Keep>& keep,
                     int64_t* steps) {
  const int64_t k = generator.plan.latent_size();
  const std::vector<Leg> legs = legs_of(args.descent.steps, args.restarts, keep);
  Rows rows;
  for (int64_t row = 0; row < args.images_count * args.restarts; ++row)
    rows.restart.push_back(int(row % args.restarts));
  std::vector<float> errors;
  for (size_t n = 0; n < legs.size(); ++n) {
    const Leg& leg = legs[n];
    const int64_t count = args.images_count * leg.rows;
    if (n > 0) rows = best_rows(rows, errors, legs[n - 1].rows, leg.rows, k);
    ProjectArgs part = args;
    Rows after{rows.restart, std::vector<float>(size_t(count * k)), std::vector<float>(size_t(count * k))};
    errors.resize(size_t(count));
    if (n > 0) {
      part.start = rows.latents.data();
      part.start_per_image = true;
      part.velocities = rows.velocities.data();
    }
    part.restarts = leg.rows;
    part.descent.rates = args.descent.rates + leg.begin;
    part.descent.steps = leg.end - leg.begin;
    part.latents = after.latents.data();
    part.velocities_out = after.velocities.data();
    part.errors = errors.data();
    project(generator, part);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t to = row / leg.rows * args.restarts + after.restart[size_t(row)];
      copy_line(after.latents.data(), row, args.latents, to, k);
      args.errors[to] = errors[size_t(row)];
      steps[to] = leg.end;
    }
    rows = std::move(after);
  }
}

}  // namespace defgan::cpu
