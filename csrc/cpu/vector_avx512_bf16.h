// The 512-bit vector type with the BF16 instructions, for the files of the sets that have them.
struct Vector512Bf16 : Vector512 {
  static T dot_bfloat16(T acc, T x, T w) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w); }
  static T load_bfloat16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static void store_bfloat16(uint16_t* p, T v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};
