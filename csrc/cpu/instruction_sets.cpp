#include "instruction_sets.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(DEFGAN_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace defgan::cpu {
namespace {

#if defined(DEFGAN_HAS_AMX)
// Whether the processor has bfloat16 products of tiles and the kernel lets this process use them: it must be asked,
// since their registers make every thread's saved state larger.
bool may_use_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;
  if ((d & kTile) == 0 || (d & kBfloat16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

int64_t second_level_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names = {"baseline"};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      names.push_back("avx512");
      if (__builtin_cpu_supports("avx512bf16")) {
        names.push_back("avx512_bf16");
#if defined(DEFGAN_HAS_AMX)
        static const bool amx = may_use_amx();
        if (amx) names.push_back("amx");
#endif
      }
    }
  }
#endif
  return names;
}

const InstructionSet& instruction_set(const std::string& name) {
  std::string known;
  for (const std::string& supported : supported_instruction_sets()) {
    known += (known.empty() ? "" : ", ") + supported;
    if (supported != name) continue;
#if defined(__x86_64__)
    if (name == "avx2") return avx2_kernels();
    if (name == "avx512") return avx512_kernels();
    if (name == "avx512_bf16") return avx512_bf16_kernels();
#endif
#if defined(DEFGAN_HAS_AMX)
    if (name == "amx") return amx_kernels();
#endif
    return baseline_kernels();
  }
  throw std::invalid_argument("instruction set must be one of " + known + " on this machine, got '" + name + "'");
}

const InstructionSet& active_instruction_set() {
  static const InstructionSet& best = instruction_set(supported_instruction_sets().back());
  const char* forced = std::getenv("DEFGAN_CPU_ISA");
  if (forced == nullptr || *forced == 0) return best;
  try {
    return instruction_set(forced);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("DEFGAN_CPU_ISA: ") + error.what());
  }
}

}  // namespace defgan::cpu
