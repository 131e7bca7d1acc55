// The 512-bit vector type that both AVX-512 files share; the one with BF16 instructions adds those.
struct Vector512 {
  using T = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kAheadVectors = 2, kSoonSteps = 24;
  static constexpr bool kAheadChoice = false;
  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static T all(float x) { return _mm512_set1_ps(x); }
  static T broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static T zero() { return _mm512_setzero_ps(); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T div(T a, T b) { return _mm512_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T min(T a, T b) { return _mm512_min_ps(a, b); }
  static T max(T a, T b) { return _mm512_max_ps(a, b); }
  static T select_positive(T x, T a, T b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), b, a);
  }
  static T select_nan(T x, T a, T b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), b, a); }
  static T round(T x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static T power_of_two(T n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
  // Lane i: the sum of the lanes of v[i], all in the same order.
  static T sums(const T (&v)[kLanes]) {
    T pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; ++i)
      pairs[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i) eights[i] = add_quarters(fours[2 * i], fours[2 * i + 1]);
    return add_quarters(eights[0], eights[1]);
  }
  // Neighbouring quarters of a, then those of b.
  static T add_quarters(T a, T b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
  static T lower_bfloat16(T x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
  static T upper_bfloat16(T x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int(0xffff0000u))));
  }
  static void keep(T& v) { asm volatile("" : "+v"(v)); }
};
