// The two storage types of kernels.h over a vector type V; included once by each instruction set's file,
// inside its anonymous namespace and under its target.

template <class Vector>
struct Float32 {
  using V = Vector;
  static constexpr int kChannels = 16, kStepChannels = 1;
  static typename V::T mac(typename V::T acc, typename V::T x, typename V::T w) { return V::fma(x, w, acc); }
  static typename V::T channel_of_step(typename V::T w, int) { return w; }
  static typename V::T load(const char* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static void store(char* p, typename V::T v) { V::store(reinterpret_cast<float*>(p), v); }
  static float get(const char* p) { return *reinterpret_cast<const float*>(p); }
  static void put(char* p, float v) { *reinterpret_cast<float*>(p) = v; }
};

// A dword holds two channels; the products of both are accumulated in float32.
template <class Vector>
struct Bfloat16 {
  using V = Vector;
  static constexpr int kChannels = 32, kStepChannels = 2;
  static typename V::T mac(typename V::T acc, typename V::T x, typename V::T w) { return V::dot_bfloat16(acc, x, w); }
  static typename V::T channel_of_step(typename V::T w, int channel) {
    return channel == 0 ? V::lower_bfloat16(w) : V::upper_bfloat16(w);
  }
  static typename V::T load(const char* p) { return V::load_bfloat16(reinterpret_cast<const uint16_t*>(p)); }
  static void store(char* p, typename V::T v) { V::store_bfloat16(reinterpret_cast<uint16_t*>(p), v); }
  static float get(const char* p) {
    const uint32_t bits = uint32_t(*reinterpret_cast<const uint16_t*>(p)) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  static void put(char* p, float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    *reinterpret_cast<uint16_t*>(p) =
        v == v ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t((bits >> 16) | 0x40);
  }
};
