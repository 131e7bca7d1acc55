// Lends torch's own threads to the CPU kernels. Threads of our own would share the cores with torch's: after a parallel
// operation these spin for milliseconds in wait of the next one, and take half of a core from whoever comes instead.
//
// torch's threads belong to its OpenMP runtime, and a thread that starts a parallel region gets the same ones every time.
// The region is started by the runtime's own entry, looked up weakly among the libraries that torch brought along: with
// a compiler's pragma the extension would be linked to that compiler's runtime, which need not be torch's.
#include "project_pool.h"

#include <ATen/Parallel.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>

#include "cpu/cores.h"
#include "cpu/team.h"

#if AT_PARALLEL_OPENMP && defined(__linux__)
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_procs();
}

namespace defgan {
namespace {

// The pool does not survive a fork: GNU's runtime would wait for ever for threads that the child does not have. So no
// pool is asked in a process that is a fork, be it of one that had loaded this library or of one that had not.
bool is_fork() {
  constexpr unsigned long kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC of the kernel's task flags
  std::ifstream file("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  const size_t name_end = text.rfind(')');  // the name before it may hold anything
  if (name_end == std::string::npos) return true;
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int field = 3; field < 9; ++field) fields >> skipped;
  unsigned long flags = 0;
  return !(fields >> flags) || (flags & kForkedWithoutExec);
}
std::atomic<bool> forked{is_fork()};
const int remember_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

struct Region {
  int threads;
  const std::function<void(int)>& body;
  bool complete;
};

bool run(int threads, const std::function<void(int)>& body) {
  // A region has as many threads as torch uses, and to ask for others would have the runtime end and start threads.
  if (forked.load() || at::in_parallel_region() || at::get_num_threads() != threads) return false;
  Region region{threads, body, false};
  const auto share = [](void* data) {
    Region& r = *static_cast<Region*>(data);
    if (omp_get_num_threads() != r.threads) return;  // the environment may limit them
    const c10::ParallelGuard guard(true);
    const int thread = omp_get_thread_num();
    if (thread == 0) r.complete = true;
    r.body(thread);
  };
  GOMP_parallel(share, &region, 0, 0);
  return region.complete;
}

}  // namespace

void lend_torch_threads() {
  if (GOMP_parallel && omp_get_num_threads && omp_get_thread_num) cpu::use_pool(run);
}

// A runtime that has bound its threads, the calling one among them, to a core each knows what the process may use.
static int processors() { return omp_get_num_procs ? omp_get_num_procs() : cpu::cores_of_affinity(); }

}  // namespace defgan
#else
namespace defgan {
void lend_torch_threads() {}
static int processors() { return cpu::cores_of_affinity(); }
}  // namespace defgan
#endif

int defgan::usable_threads() {
  if (at::in_parallel_region()) return 1;
  static const int quota = cpu::cores_of_quota();
  const int cores = std::max(1, std::min(processors(), quota));
  cpu::set_cores(cores);
  return std::min(at::get_num_threads(), cores);
}
