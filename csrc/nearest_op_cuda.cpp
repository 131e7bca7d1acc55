// The GPU's half of the op `nearest`; compiled only where the CUDA kernels are. Decoded candidates stay on the device.
// Which memory to look at is told by the addresses of parameters and candidates; whether what is there was decoded from
// their present contents is decided on the device (cuda/find_nearest.h), so neither an address that is used again nor a change
// by whatever means can go unnoticed, and the host waits for nothing but a first call's tables.
//
// Several streams may share what is kept. They only read it while the contents stay the same. After a change each of them
// finds it stale, or complete; those that find it stale write the same bits. Contents that differ at one address at
// the same time are excluded by whoever changes them, who must order that with the calls that read them.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/nearest_search.h"
#include "nearest_op.h"
#include "op_cuda.h"

namespace defgan {
namespace {

constexpr size_t kKeptCandidates = 4;

struct KeptCandidates {
  Tensor memory;
  Tensor valid;  // one word, 0 until the memory's contents are whole
};
using KeptKey = std::tuple<std::shared_ptr<const Compiled>, at::Device, int64_t, std::vector<const void*>>;

KeptCandidates kept_candidates(const std::shared_ptr<const Compiled>& compiled, const Tensor& candidates,
                               at::TensorList parameters, size_t bytes) {
  static auto& kept = *new Kept<KeptKey, KeptCandidates>(kKeptCandidates);
  std::vector<const void*> addresses = {candidates.const_data_ptr()};
  for (const Tensor& p : parameters) addresses.push_back(p.const_data_ptr());
  return kept.get({compiled, candidates.device(), candidates.size(0), addresses}, capturing(), [&] {
    const uint32_t zeros[64] = {};
    const Tensor valid = upload(zeros, sizeof(zeros), candidates.device());
    return KeptCandidates{at::empty({int64_t(bytes)}, candidates.options().dtype(at::kByte)), valid};
  });
}

Tensor nearest_cuda(const Tensor& images, const Tensor& candidates, at::TensorList parameters,
                    const std::string& description, int64_t restarts, const std::optional<Tensor>& draws) {
  return translated([&] {
    const std::shared_ptr<const Compiled> c = compiled(description, parameters, cuda::Precision::kFloat32);
    check_nearest(c->plan, images, candidates, restarts, draws);
    const c10::cuda::CUDAGuard guard(images.device());
    const int64_t count = images.size(0);
    const Tensor targets = images.to(at::kFloat).contiguous(), latents = candidates.to(at::kFloat).contiguous();
    const Tensor own_draws = draws ? draws->contiguous() : Tensor();
    const Parameters own(parameters, images.device());
    Tensor indices = at::empty({count, restarts}, targets.options().dtype(at::kLong));
    if (count == 0) return indices;

    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const cuda::Device device = properties_of(images.device());
    const cuda::SearchSizes sizes = cuda::search_sizes(*c->program, own.views, device, latents.size(0), count);
    const Tensor tables = read_on(device_tables(c, images.device()), stream);
    const KeptCandidates kept = kept_candidates(c, candidates, parameters, sizes.kept_bytes);
    read_on(kept.memory, stream);
    read_on(kept.valid, stream);
    const Tensor working = at::empty({int64_t(sizes.workspace_bytes)}, targets.options().dtype(at::kByte));
    cuda::SearchArgs args{};
    args.candidates = latents.const_data_ptr<float>();
    args.count = latents.size(0);
    args.images = targets.const_data_ptr<float>();
    args.draws = draws ? own_draws.const_data_ptr<int64_t>() : nullptr;
    args.images_count = count;
    args.restarts = restarts;
    args.kept = kept.memory.mutable_data_ptr();
    args.valid = static_cast<uint32_t*>(kept.valid.mutable_data_ptr());
    args.workspace = working.mutable_data_ptr();
    args.indices = indices.mutable_data_ptr<int64_t>();
    cuda::find_nearest(*c->program, tables.const_data_ptr(), own.views, device, args, stream.stream());
    return indices;
  });
}

}  // namespace
}  // namespace defgan

TORCH_LIBRARY_IMPL(defgan_fast, CUDA, m) { m.impl("nearest", &defgan::nearest_cuda); }
