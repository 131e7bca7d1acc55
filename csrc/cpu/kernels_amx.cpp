// Kernels for AMX: bfloat16 products in tile registers. float32 and all that is not a product are AVX-512's.
// See kernels_avx2.cpp for why no flags and no std::.
//
// A tile register is 16 rows of 64 bytes. One operand is a unit of up to 16 rows (or of up to 16 neighbouring positions
// of a single row) as it lies in memory, the other 16 steps of a panel's vector. Every element of a result takes its
// products in one order (taps in list order, units ascending, within a unit as the instruction does), whatever else
// is in the tile, so bits do not depend on the tile's shape here either.
//
// Assembly, since GCC 12's intrinsics do not say that they read memory: it dropped the writing of a configuration that
// was loaded right after.
#include "instruction_sets.h"
#if defined(DEFGAN_HAS_AMX)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: false, from inside its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#endif

namespace defgan::cpu {
namespace {

#include "vector_avx512.h"
#include "vector_avx512_bf16.h"
using Vector = Vector512Bf16;

#include "storage.h"
#include "gather_gemm.h"
#include "elementwise.h"

using Storage = Bfloat16<Vector>;

constexpr int kTileRows = 16;
constexpr int kVectorBytes = kUnitFloats * 4;
constexpr int kWeightStride = 2 * kVectorBytes;  // one step of a panel
constexpr int kUnitWeights = kUnitFloats * kWeightStride;

// Registers: sums[half][vector] are 0 to 3, the halves' sources 4 and 5, the weights' vectors 6 and 7.
constexpr int kSource = 4, kWeights = 6;
constexpr int sums(int half, int vector) { return 2 * half + vector; }

template <int kTile>
void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
// With the hint that it will not be used again soon: weights pass by, and the source is to stay in the first level.
template <int kTile>
void stream(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kSum, int kA, int kB>
void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// Rows of the halves that this thread's tile registers are configured for; 0: not configured.
thread_local int configured[2] = {0, 0};

void configure(int first, int second) {
  if (configured[0] == first && configured[1] == second) return;
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape = {};
  shape.palette = 1;
  for (int t = 0; t < 8; ++t) {
    shape.row_bytes[t] = kUnitBytes;
    shape.rows[t] = kTileRows;
  }
  for (int half = 0; half < 2; ++half) {
    const int rows = half == 0 ? first : second;
    for (const int t : {sums(half, 0), sums(half, 1), kSource + half}) shape.rows[t] = uint8_t(rows);
  }
  asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  configured[0] = first;
  configured[1] = second;
}

void release() {
  if (configured[0] == 0) return;
  asm volatile("tilerelease");
  configured[0] = configured[1] = 0;
}

template <int kHalves>
void products() {
  multiply_add<sums(0, 0), kSource, kWeights>();
  multiply_add<sums(0, 1), kSource, kWeights + 1>();
  if constexpr (kHalves == 2) {
    multiply_add<sums(1, 0), kSource + 1, kWeights>();
    multiply_add<sums(1, 1), kSource + 1, kWeights + 1>();
  }
}

template <int kHalf>
void start(const float* bias) {
  if (bias) {
    load<sums(kHalf, 0)>(bias, 0);  // the same line for every row
    load<sums(kHalf, 1)>(bias + kUnitFloats, 0);
  } else {
    zero<sums(kHalf, 0)>();
    zero<sums(kHalf, 1)>();
  }
}

template <int kHalf, Epilogue E>
void finish(const GemmArgs& g, int rows, char* destination) {
  if constexpr (E == Epilogue::kRaw) {
    store<sums(kHalf, 0)>(destination, kUnitBytes);
    store<sums(kHalf, 1)>(destination + g.destination_unit_stride, kUnitBytes);
    return;
  }
  alignas(64) float values[kTileRows][2][kUnitFloats];
  store<sums(kHalf, 0)>(values[0][0], kWeightStride);
  store<sums(kHalf, 1)>(values[0][1], kWeightStride);
  for (int row = 0; row < rows; ++row) {
    char* const d = destination + row * kUnitBytes;
    Vector::T x[2];
    for (int n = 0; n < 2; ++n) {
      x[n] = Vector::load(values[row][n]);
      if constexpr (E == Epilogue::kActivate)
        x[n] = Vector::select_positive(x[n], x[n], Vector::mul(x[n], Vector::all(g.slope)));
      else
        x[n] = times_derivative<Vector>(x[n], Storage::load(d + n * (kUnitBytes / 2)), g.activation, g.slope);
    }
    _mm512_storeu_si512(d, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
  }
}

// A panel of one position, or of two with the same matrices; of one position up to 32 rows, in two halves.
template <Epilogue E, int kHalves>
void gemm_halves(const GemmArgs& g, int first_rows, int second_rows, const Tap* second_taps, const char* second_source,
                 char* second_destination) {
  configure(first_rows, second_rows);
  start<0>(g.bias);
  if constexpr (kHalves == 2) start<1>(g.bias);
  const char* ahead = g.ahead;
  const int64_t ahead_advance = g.ahead_advance;
  for (int t = 0; t < g.tap_count; ++t) {
    const char* a = g.source + g.taps[t].source * g.position_stride;
    const char* b = kHalves == 2 ? second_source + second_taps[t].source * g.position_stride : nullptr;
    const char* w = g.weights + g.taps[t].matrix * g.matrix_stride;
    for (int left = g.steps; left > 0; left -= kUnitFloats, a += g.unit_stride, w += kUnitWeights) {
      for (int64_t line = 0; line < ahead_advance; line += 64) __builtin_prefetch(ahead + line, 0, 2);
      ahead += ahead_advance;
      load<kSource>(a, kUnitBytes);
      stream<kWeights>(w, kWeightStride);
      stream<kWeights + 1>(w + kVectorBytes, kWeightStride);
      if constexpr (kHalves == 2) {
        load<kSource + 1>(b, kUnitBytes);
        b += g.unit_stride;
      }
      products<kHalves>();
    }
  }
  finish<0, E>(g, first_rows, g.destination);
  if constexpr (kHalves == 2) finish<1, E>(g, second_rows, second_destination);
}

template <Epilogue E>
void gemm_twins(const GemmArgs& g) {
  gemm_halves<E, 2>(g, g.rows, g.rows, g.twin_taps, g.source, g.twin_destination);
}

template <Epilogue E>
void gemm(const GemmArgs& g) {
  if (g.rows > kTileRows) {
    const int first = (g.rows + 1) / 2;
    gemm_halves<E, 2>(g, first, g.rows - first, g.taps, g.source + first * kUnitBytes,
                      g.destination + first * kUnitBytes);
  } else {
    // Configured as for twins, since a position without one comes between positions that have one.
    gemm_halves<E, 1>(g, g.rows, g.rows, nullptr, nullptr, nullptr);
  }
}

template <int kHalf>
void load_sums(const TapArgs& g) {
  load<sums(kHalf, 0)>(g.destination[kHalf], g.destination_step);
  load<sums(kHalf, 1)>(g.destination[kHalf] + g.destination_unit_stride, g.destination_step);
}

template <int kHalf>
void store_sums(const TapArgs& g) {
  store<sums(kHalf, 0)>(g.destination[kHalf], g.destination_step);
  store<sums(kHalf, 1)>(g.destination[kHalf] + g.destination_unit_stride, g.destination_step);
}

// One or two segments of positions, one tap, one row; accumulates in float32.
template <int kHalves>
void tap(const TapArgs& g) {
  configure(g.positions, g.positions);
  load_sums<0>(g);
  if constexpr (kHalves == 2) load_sums<1>(g);
  const char* w = g.weights;
  int64_t unit = 0;
  for (int left = g.steps; left > 0; left -= kUnitFloats, unit += g.unit_stride, w += kUnitWeights) {
    load<kWeights>(w, kWeightStride);
    load<kWeights + 1>(w + kVectorBytes, kWeightStride);
    load<kSource>(g.source[0] + unit, kUnitBytes);
    if constexpr (kHalves == 2) load<kSource + 1>(g.source[1] + unit, kUnitBytes);
    products<kHalves>();
  }
  store_sums<0>(g);
  if constexpr (kHalves == 2) store_sums<1>(g);
}

double multiply_adds(int64_t rounds) {
  configure(kTileRows, kTileRows);
  zero<0>(), zero<1>(), zero<2>(), zero<3>(), zero<4>(), zero<5>(), zero<6>(), zero<7>();
  for (int64_t r = 0; r < rounds; ++r) products<2>();
  release();
  return double(rounds) * 4 * 2.0 * kTileRows * kUnitFloats * Storage::kChannels * 1e-9;
}

KernelTable bfloat16;

InstructionSet make() {
  Elementwise<Storage>::fill(bfloat16);
  bfloat16.multiply_adds = multiply_adds;
  bfloat16.release = release;
  bfloat16.lanes = Vector::kLanes;
  bfloat16.unit_channels = Storage::kChannels;
  bfloat16.max_rows[kOneVector] = bfloat16.max_rows[kOnePanel] = 2 * kTileRows;
  bfloat16.step_multiple = kUnitFloats;
  bfloat16.tails = false;
  bfloat16.twins = bfloat16.tile_registers = true;
  bfloat16.max_segments = 2;
  bfloat16.max_segment = kTileRows;
  bfloat16.max_positions = 2 * kTileRows;
  for (int rows = 1; rows <= 2 * kTileRows; ++rows) {
    bfloat16.gemm[int(Epilogue::kRaw)][kOnePanel][rows] = gemm<Epilogue::kRaw>;
    bfloat16.gemm[int(Epilogue::kActivate)][kOnePanel][rows] = gemm<Epilogue::kActivate>;
    bfloat16.gemm[int(Epilogue::kGradient)][kOnePanel][rows] = gemm<Epilogue::kGradient>;
  }
  for (int rows = 1; rows <= kTileRows; ++rows) {
    bfloat16.gemm_twins[int(Epilogue::kRaw)][kOnePanel][rows] = gemm_twins<Epilogue::kRaw>;
    bfloat16.gemm_twins[int(Epilogue::kActivate)][kOnePanel][rows] = gemm_twins<Epilogue::kActivate>;
    bfloat16.gemm_twins[int(Epilogue::kGradient)][kOnePanel][rows] = gemm_twins<Epilogue::kGradient>;
  }
  for (int positions = 1; positions <= kTileRows; ++positions) {
    bfloat16.tap[kOnePanel][1][positions] = tap<1>;
    bfloat16.tap[kOnePanel][2][positions] = tap<2>;
  }
  const InstructionSet& wide = avx512_kernels();
  return {"amx", wide.float32, &bfloat16, wide.image};
}

}  // namespace

const InstructionSet& amx_kernels() {
  static const InstructionSet set = make();
  return set;
}

}  // namespace defgan::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
