// Arithmetic in the CPU execution of kernels: rounding to 16 bits against the formats' definitions, and what the matrix
// instructions compute and move with the layouts that the PTX ISA gives.
#include <cmath>
#include <cstdlib>
#include <random>
#include <type_traits>

#include "execution.h"

namespace {

double value_of_half(int bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
double value_of_bfloat16(int bits) {
  const int exponent = bits >> 7 & 255, mantissa = bits & 127;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class S>
void rounding(double (*value_of)(int), int infinity) {
  const char* name = std::is_same_v<S, Half> ? "half" : "bfloat16";
  for (int bits = 0; bits < infinity; ++bits)
    for (const int sign : {0, 0x8000}) {
      const double value = value_of(bits | sign);
      float low, high;
      unpack2<S>(static_cast<uint32_t>(bits | sign) << 16 | 0x1u, low, high);
      CHECK(high == value, "%s %x is %g, not %g", name, bits | sign, high, value);
      CHECK(to_bits<S>(static_cast<float>(value)) == (bits | sign), "%s %x does not come back", name, bits | sign);
      // Between this value and the next: nearer one, or the even one; beyond the largest as if one more followed.
      const double next = bits + 1 == infinity ? 2 * value_of(bits) - value_of(bits - 1) : value_of(bits + 1);
      const double step = next - value_of(bits), sign_factor = sign ? -1.0 : 1.0;
      for (const double part : {0.25, 0.5 - 1.0 / 4096, 0.5, 0.5 + 1.0 / 4096, 0.75}) {
        const double between = sign_factor * (value_of(bits) + part * step);
        const float argument = static_cast<float>(between);
        if (static_cast<double>(argument) != between) continue;  // bfloat16's subnormals: floats are as coarse
        const int up = part > 0.5 || (part == 0.5 && bits % 2 == 1);
        CHECK(to_bits<S>(argument) == ((bits + up) | sign), "%s of %a is %x, not %x", name, argument,
              to_bits<S>(argument), (bits + up) | sign);
      }
    }
  const float huge = INFINITY;
  float low, high;
  unpack2<S>(pack2<S>(huge, -huge), low, high);
  CHECK(low == huge && high == -huge, "%s: infinity becomes %g, %g", name, low, high);
  unpack2<S>(pack2<S>(NAN, 1.0f), low, high);
  CHECK(std::isnan(low) && high == 1.0f && to_bits<S>(NAN) == 0x7fff, "%s: NaN", name);
  CHECK(pack2<S>(1.0f, -2.0f) == (to_bits<S>(1.0f) | static_cast<uint32_t>(to_bits<S>(-2.0f)) << 16), "%s", name);
  CHECK(to_bits<S>(-0.0f) == 0x8000, "%s: minus zero", name);
}

// One mma on random matrices, filled and read by the formulas of the PTX ISA (section "Matrix Fragments for
// mma.m16n8k16 with floating point type").
template <class S>
void matrix_product() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto rounded = [&](float value) {
    float low, high;
    unpack2<S>(pack2<S>(value, 0), low, high);
    return low;
  };
  float a[16][16], b[16][8], c[16][8], d[16][8];
  for (auto& row : a)
    for (float& value : row) value = rounded(normal(random));
  for (auto& row : b)
    for (float& value : row) value = rounded(normal(random));
  for (auto& row : c)
    for (float& value : row) value = normal(random);
  Memory memory;
  const std::string message = outcome(
      memory, {1, 64, 0, false},
      [&] {
        const int lane = thread_index() % 32, group = lane / 4, in_group = lane % 4;
        uint32_t a_registers[4], b_registers[2];
        for (int i = 0; i < 8; i += 2) {
          const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = in_group * 2 + (i >= 4 ? 8 : 0);
          a_registers[i / 2] = pack2<S>(a[row][column], a[row][column + 1]);
        }
        for (int i = 0; i < 4; i += 2) {
          const int row = in_group * 2 + (i >= 2 ? 8 : 0);
          b_registers[i / 2] = pack2<S>(b[row][group], b[row + 1][group]);
        }
        float sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = c[i < 2 ? group : group + 8][in_group * 2 + i % 2];
        multiply_accumulate<S>(sums, Vec4{a_registers[0], a_registers[1], a_registers[2], a_registers[3]},
                               b_registers[0], b_registers[1]);
        for (int i = 0; i < 4; ++i) d[i < 2 ? group : group + 8][in_group * 2 + i % 2] = sums[i];
      },
      0);
  CHECK(message.empty(), "%s", message.c_str());
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double exact = c[m][n];
      float in_order = c[m][n];
      for (int k = 0; k < 16; ++k) {
        exact += static_cast<double>(a[m][k]) * b[k][n];
        in_order += a[m][k] * b[k][n];
      }
      CHECK(d[m][n] == in_order && std::abs(d[m][n] - exact) < 2e-5, "d[%d][%d] is %g, not %g", m, n, d[m][n], exact);
    }
}

void matrix_moves() {
  Memory memory;
  const std::string message = outcome(
      memory, {1, 32, 512, false},
      [&] {
        const int lane = thread_index();
        const auto element = [](int matrix, int row, int column) {
          return static_cast<uint32_t>(matrix * 64 + row * 8 + column + 1);
        };
        // Lane l holds a row of matrix l / 8.
        for (int column = 0; column < 8; ++column)
          store_shared(reinterpret_cast<uint16_t*>(shared_memory()) + lane * 8 + column,
                       static_cast<uint16_t>(element(lane / 8, lane % 8, column)));
        sync_warp();
        uint32_t r[4];
        load_matrix_transposed(r, shared_memory() + lane * 16);
        // Without .trans lane l would get elements 2 (l % 4) and the next of row l / 4; so rows become columns.
        for (int matrix = 0; matrix < 4; ++matrix) {
          const uint32_t expected =
              element(matrix, lane % 4 * 2, lane / 4) | element(matrix, lane % 4 * 2 + 1, lane / 4) << 16;
          CHECK(r[matrix] == expected, "lane %d matrix %d: %x, not %x", lane, matrix, r[matrix], expected);
        }
        const uint32_t row = element(0, lane / 4, lane % 4 * 2) | element(0, lane / 4, lane % 4 * 2 + 1) << 16;
        CHECK(transpose_8x8(row) == r[0], "lane %d: movmatrix", lane);
        CHECK(transpose_8x8(transpose_8x8(row)) == row, "lane %d: twice", lane);
        for (const int mask : {1, 2, 4, 8, 16, 31})
          CHECK(shuffle_xor(static_cast<float>(lane), mask) == static_cast<float>(lane ^ mask), "shuffle %d", mask);
        for (const int from : {0, 1, 17, 31}) CHECK(shuffle_from(-lane, from) == -from, "shuffle from %d", from);
      },
      0);
  CHECK(message.empty(), "%s", message.c_str());
  int sum = 0;
  static_for<5>([&](auto i) {
    constexpr int value = decltype(i)::value;
    static_assert(value >= 0 && value < 5);
    sum = sum * 10 + value;
  });
  CHECK(sum == 1234, "%d", sum);
  CHECK(fused_multiply_add(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f) == 0x1p-11f + 0x1p-24f, "fma");
  CHECK(exponential(0.0f) == 1.0f && hyperbolic_tangent(0.0f) == 0.0f && square_root(9.0f) == 3.0f, "functions");
}

}  // namespace

int main() {
  rounding<Half>(value_of_half, 0x7c00);
  rounding<Bfloat16>(value_of_bfloat16, 0x7f80);
  matrix_product<Half>();
  matrix_product<Bfloat16>();
  matrix_moves();
  return report_execution("execution, arithmetic");
}
