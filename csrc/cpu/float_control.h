// How a thread's processor rounds and treats the smallest numbers.
#pragma once

namespace defgan::cpu {

#if defined(__x86_64__)
constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
inline unsigned float_control() { return __builtin_ia32_stmxcsr(); }
inline void set_float_control(unsigned control) { __builtin_ia32_ldmxcsr(control); }
#else
constexpr unsigned kFlushToZero = 0, kDenormalsAreZero = 0;
inline unsigned float_control() { return 0; }
inline void set_float_control(unsigned) {}
#endif

}  // namespace defgan::cpu
