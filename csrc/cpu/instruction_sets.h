// Which instruction sets this build holds and this machine can run; one is chosen per process, once.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

// AMX also needs an assembler that knows it, as those beside these compilers do, and Linux to ask for the registers.
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define DEFGAN_HAS_AMX 1
#endif

namespace defgan::cpu {

// Each builds its table on first call, in code that may use the set: call only where the machine has it.
const InstructionSet& baseline_kernels();
#if defined(__x86_64__)
const InstructionSet& avx2_kernels();
const InstructionSet& avx512_kernels();
const InstructionSet& avx512_bf16_kernels();
#endif
#if defined(DEFGAN_HAS_AMX)
const InstructionSet& amx_kernels();
#endif

// Of one core; 1 MB where the system does not say.
int64_t second_level_cache_bytes();

// Those that this machine can run, best last: "baseline", "avx2", "avx512", "avx512_bf16", "amx".
std::vector<std::string> supported_instruction_sets();

// The named set; throws std::invalid_argument where the machine cannot run it or the name is unknown.
const InstructionSet& instruction_set(const std::string& name);

// The one in use: $DEFGAN_CPU_ISA, else the best. Read at each call, so that tests can force each in turn.
const InstructionSet& active_instruction_set();

}  // namespace defgan::cpu
