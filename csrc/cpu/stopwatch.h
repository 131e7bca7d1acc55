// Where a projection's time goes, layer by layer; profile.cpp reads it.
#pragma once

#include <chrono>
#include <mutex>
#include <vector>

namespace defgan::cpu {

// Seconds summed over a projection's threads. A layer's time is its products with what is fused into them; `waiting` is
// the time in barriers. It is measured only where ProjectArgs names one.
struct Profile {
  std::vector<double> forward, backward;  // by layer
  double image = 0, latent = 0, waiting = 0;
};

// One thread's clock. Without a profile to fill it costs a comparison at each change of work.
class Stopwatch {
 public:
  Stopwatch(Profile* profile, size_t layers) : profile_(profile) {
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
  // Each books the time since the last call on what it was spent on.
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

}  // namespace defgan::cpu
