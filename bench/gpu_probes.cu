// What the card can do at best, measured with nothing but the instruction in question: the kernels are judged against
// these numbers and not against a data sheet. A program of its own, without torch; prints one JSON object.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=native -I csrc bench/gpu_probes.cu -o gpu_probes && ./gpu_probes
//
//   mma_tflops       mma.sync.m16n8k16, fp16 operands in registers, float32 sums: eight independent chains a warp
//   l2_gb_per_s      16-byte loads past L1, every block reads the same buffer of the size of the packed weights
//   meeting_us       one meeting of a team of n blocks, by the kernels' own barrier (sync_team)
//   launch_us        a kernel that does nothing, launched back to back
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.h"

namespace {

using namespace defgan::cuda;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "gpu_probes: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Median milliseconds of one run of body(), which enqueues work.
template <class Body>
double milliseconds(const Body& body, int repetitions = 9) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<float> all;
  body();
  for (int i = 0; i < repetitions; ++i) {
    float one = 0;
    check(cudaEventRecord(start), "record");
    body();
    check(cudaEventRecord(stop), "record");
    check(cudaEventSynchronize(stop), "a probe");
    check(cudaEventElapsedTime(&one, start, stop), "time");
    all.push_back(one);
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

constexpr int kChains = 8, kThreads = 256;

__global__ void __launch_bounds__(kThreads) multiply(float* out, int rounds) {
  float sums[kChains][4] = {};
  const uint32_t x = 0x2c002c00u + threadIdx.x;  // small halves, so that nothing overflows
  const Vec4 a{x, x + 1, x + 2, x + 3};
  for (int round = 0; round < rounds; ++round)
    static_for<kChains>([&](auto i) { multiply_accumulate<Half>(sums[i], a, x + i, x + i); });
  float sum = 0;
  static_for<kChains>([&](auto i) { sum += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3]; });
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(512) read_all(const Vec4* data, int count, int rounds, uint32_t* out) {
  constexpr int kInFlight = 4;
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round)
    // Blocks begin at different places, as blocks do that are not in step.
    for (int i = threadIdx.x; i + (kInFlight - 1) * 512 < count; i += kInFlight * 512) {
      Vec4 v[kInFlight];
      static_for<kInFlight>([&](auto j) { v[j] = load_global(data + (i + j * 512 + blockIdx.x * 8192) % count); });
      static_for<kInFlight>([&](auto j) { sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w; });
    }
  out[blockIdx.x * 512 + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) meet_often(TeamBarrier* barriers, int blocks_per_team, int rounds) {
  for (int round = 0; round < rounds; ++round) sync_team(barriers + blockIdx.x / blocks_per_team, blocks_per_team);
}

__global__ void __launch_bounds__(32) nothing() {}

}  // namespace

int main() {
  cudaDeviceProp card;
  check(cudaGetDeviceProperties(&card, 0), "device 0");
  const int processors = card.multiProcessorCount;
  char* memory = nullptr;
  const size_t bytes = size_t(64) << 20;
  check(cudaMalloc(&memory, bytes), "64 MB");
  check(cudaMemset(memory, 0, bytes), "clearing");

  const int blocks = processors * 4, rounds = 4096;
  const double mma = milliseconds([&] { multiply<<<blocks, kThreads>>>(reinterpret_cast<float*>(memory), rounds); });
  const double flop = 2.0 * 16 * 8 * 16 * kChains * rounds * blocks * (kThreads / 32);

  // The weights of the paper's generator, packed forward and backward.
  const int weights = 6200000 / 16 / 2048 * 2048, passes = 8;
  auto* results = reinterpret_cast<uint32_t*>(memory + (size_t(32) << 20));
  const double read = milliseconds(
      [&] { read_all<<<processors * 2, 512>>>(reinterpret_cast<const Vec4*>(memory), weights, passes, results); });
  const double read_bytes = double(weights) * 16 * passes * processors * 2;

  std::printf("{\"mma_tflops\": %.1f, \"l2_gb_per_s\": %.0f, \"meeting_us\": {", flop / mma * 1e-9,
              read_bytes / read * 1e-6);
  auto* barriers = reinterpret_cast<TeamBarrier*>(memory);
  const int meetings = 2000;
  bool first = true;
  for (int team : {1, 2, 4, 6, 8, 16, 32, 66, processors}) {
    if (team > processors) continue;
    int per_team = team, count = meetings;
    void* arguments[] = {&barriers, &per_team, &count};
    check(cudaMemset(barriers, 0, sizeof(TeamBarrier) * size_t(processors)), "clearing");
    const double one = milliseconds([&] {
      check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(meet_often), dim3(processors / team * team),
                                        dim3(kThreads), arguments, 0, nullptr),
            "cooperative launch");
    });
    std::printf("%s\"%d\": %.3f", first ? "" : ", ", team, one * 1e3 / meetings);
    first = false;
  }
  const int launches = 200;
  const double empty = milliseconds([&] {
    for (int i = 0; i < launches; ++i) nothing<<<1, 32>>>();
  });
  std::printf("}, \"launch_us\": %.2f}\n", empty * 1e3 / launches);
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), "the last kernel");
  return 0;
}
