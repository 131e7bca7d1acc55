// The torch op that finds the nearest of some thousand candidates for each image: schema, checks, fake kernel, and the
// CPU's half with its cache of decoded candidates. nearest_op_cuda.cpp has the GPU's half.
#include "nearest_op.h"

#include <pthread.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <list>
#include <mutex>

#include "cpu/content_hash.h"
#include "cpu/instruction_sets.h"
#include "cpu/nearest.h"
#include "project_pool.h"

namespace defgan {
namespace {

// --- decoded candidates, cached by content ----------------------------------------------------------------

struct CacheEntry {
  std::string plan;
  const cpu::InstructionSet* set;
  cpu::Hash hash;
  std::shared_ptr<const cpu::Candidates> candidates;
};
constexpr size_t kCacheEntries = 8, kCacheBytes = size_t(512) << 20;

std::mutex cache_mutex;
std::list<CacheEntry> cache;  // most recently used first

// A child (a DataLoader's worker) would wait for ever for a mutex that another thread held when it was forked.
const int whole_across_fork =
    pthread_atfork([] { cache_mutex.lock(); }, [] { cache_mutex.unlock(); }, [] { cache_mutex.unlock(); });

std::shared_ptr<const cpu::Candidates> candidates_of(const std::string& description, const Plan& plan,
                                                     const Tensor& latents, at::TensorList parameters) {
  std::vector<Tensor> held;
  std::vector<cpu::Parameter> views;
  for (const Tensor& p : parameters) {
    held.push_back(checked_parameter(p, at::kCPU));
    views.push_back({held.back().const_data_ptr<float>(), held.back().numel()});
  }
  const std::vector<cpu::Parameter> weights = views;
  views.push_back({latents.const_data_ptr<float>(), latents.numel()});
  const cpu::Hash hash = cpu::hash_of(views, usable_threads());
  // Instruction sets decode to different last bits.
  const cpu::InstructionSet& set = cpu::active_instruction_set();
  {
    std::lock_guard<std::mutex> lock(cache_mutex);
    for (auto it = cache.begin(); it != cache.end(); ++it)
      if (it->hash == hash && it->set == &set && it->plan == description) {
        cache.splice(cache.begin(), cache, it);
        return it->candidates;
      }
  }
  const auto packed = cpu::pack(plan, weights, set, cpu::Precision::kFloat32);
  const auto made =
      cpu::decode_candidates(plan, *packed, latents.const_data_ptr<float>(), latents.size(0), usable_threads());
  std::lock_guard<std::mutex> lock(cache_mutex);
  cache.push_front({description, &set, hash, made});
  size_t bytes = 0, kept = 0;
  for (auto it = cache.begin(); it != cache.end();) {
    bytes += it->candidates->bytes();
    ++kept;
    it = kept > 1 && (kept > kCacheEntries || bytes > kCacheBytes) ? cache.erase(it) : std::next(it);
  }
  return made;
}

// --- the op -----------------------------------------------------------------------------------------------

Tensor nearest_cpu(const Tensor& images, const Tensor& candidates, at::TensorList parameters,
                   const std::string& description, int64_t restarts, const std::optional<Tensor>& draws) {
  const Plan plan = plan_of(description);
  check_nearest(plan, images, candidates, restarts, draws);
  const Tensor targets = images.to(at::kFloat).contiguous(), latents = candidates.to(at::kFloat).contiguous();
  Tensor indices = at::empty({images.size(0), restarts}, targets.options().dtype(at::kLong));
  if (images.size(0) == 0) return indices;
  const Tensor own_draws = draws ? draws->contiguous() : Tensor();
  translated([&] {
    const auto packed = candidates_of(description, plan, latents, parameters);
    cpu::NearestArgs args{};
    args.images = targets.const_data_ptr<float>();
    args.draws = draws ? own_draws.const_data_ptr<int64_t>() : nullptr;
    args.images_count = images.size(0);
    args.restarts = restarts;
    args.threads = usable_threads();
    args.indices = indices.mutable_data_ptr<int64_t>();
    cpu::find_nearest(*packed, args);
  });
  return indices;
}

Tensor nearest_meta(const Tensor& images, const Tensor&, at::TensorList, const std::string&, int64_t restarts,
                    const std::optional<Tensor>&) {
  return at::empty_symint({images.sym_size(0), restarts}, images.options().dtype(at::kLong));
}

}  // namespace
}  // namespace defgan

TORCH_LIBRARY_FRAGMENT(defgan_fast, m) {
  // images [B, C, H, W], candidates [N, k], parameters as the plan numbers them, draws [B] int64 or none -> indices
  // [B, R] int64 of the candidates whose images are nearest in mean squared error, the nearest first, the lowest index
  // first among equals. With draws a half of the candidates, by each image's draw, comes before the other half.
  m.def(
      "nearest(Tensor images, Tensor candidates, Tensor[] parameters, str plan, int restarts, Tensor? draws=None) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(defgan_fast, CPU, m) { m.impl("nearest", &defgan::nearest_cpu); }
TORCH_LIBRARY_IMPL(defgan_fast, Meta, m) { m.impl("nearest", &defgan::nearest_meta); }
// Indices have no derivative.
TORCH_LIBRARY_IMPL(defgan_fast, Autograd, m) { m.impl("nearest", torch::autograd::autogradNotImplementedFallback()); }
