// The gather-GEMM micro-kernels, a template over a storage type (see kernels.h); included once by each
// instruction set's file, inside its anonymous namespace and under its target.
//
// One kernel computes a tile of M rows x NR vectors of output channels in registers, over all taps of one
// output position. Lanes are output channels; every accumulator takes its products in the same order (taps
// in list order, channels ascending, one fused multiply-add each), so a result's bits do not depend on the
// tile's shape, on which thread computes it, or on which of the two schedules does.
//
// Of a vector type: kAheadVectors, up to how many vectors of a tile the weights that come next are fetched into the
// second-level cache; kAheadChoice, whether the row schedule's kernels of these can also do without; kSoonSteps, how many
// steps ahead such kernels fetch weights into the first level (0: not at all).
//
// Storage S provides: V (vector type with load, store, broadcast, zero, fma, ...), kChannels (of a unit),
// mac(acc, dword, weights), load(const char*) and store(char*, v) of V::kLanes channels.

#if defined(__clang__)
#define DEFGAN_UNROLL(n) _Pragma("unroll")
#else
#define DEFGAN_PRAGMA(x) _Pragma(#x)
#define DEFGAN_UNROLL(n) DEFGAN_PRAGMA(GCC unroll n)
#endif

// Bytes from a tile's first channel to its n-th vector, in units of `channels` channels.
template <class V, int kChannels>
inline int64_t vector_offset(int n, int64_t unit_stride) {
  const int channel = n * V::kLanes;
  return (channel / kChannels) * unit_stride + (channel % kChannels) * (kUnitBytes / kChannels);
}

// derivative of the activation from its stored output, times the incoming gradient
template <class V>
inline typename V::T times_derivative(typename V::T gradient, typename V::T stored, Activation activation,
                                      float slope) {
  if (activation == Activation::kSigmoid) return V::mul(gradient, V::sub(stored, V::mul(stored, stored)));
  if (activation == Activation::kTanh) return V::mul(gradient, V::sub(V::all(1.0f), V::mul(stored, stored)));
  return V::select_positive(stored, gradient, V::mul(gradient, V::all(slope)));
}

// Fetches the weights that a panel has kSoonSteps later.
template <class V, int NR>
inline void fetch_soon(const char* weights) {
  constexpr int kStepBytes = (NR == 1 ? 1 : 2) * V::kLanes * 4;
  if constexpr (V::kSoonSteps > 0)
    for (int line = 0; line < kStepBytes; line += 64)
      __builtin_prefetch(weights + V::kSoonSteps * kStepBytes + line, 0, 3);
}

// M rows of one position, or of two with the same matrices (kPositions), which then share every weight that is loaded.
template <class S, int M, int NR, Epilogue E, int kPositions, bool kAhead>
void gemm_tile(const GemmArgs& g) {
  using V = typename S::V;
  constexpr int kRows = M * kPositions;
  typename V::T acc[kRows][NR];
  DEFGAN_UNROLL(16)
  for (int n = 0; n < NR; ++n) {
    const typename V::T start = g.bias ? V::load(g.bias + n * V::kLanes) : V::zero();
    DEFGAN_UNROLL(16)
    for (int m = 0; m < kRows; ++m) acc[m][n] = start;
  }
  constexpr int kPanelVectors = NR == 1 ? 1 : 2;
  constexpr int kStepBytes = kPanelVectors * V::kLanes * 4;
  const char* ahead = g.ahead;
  const int64_t ahead_advance = g.ahead_advance;
  for (int t = 0; t < g.tap_count; ++t) {
    const char* a[kPositions];
    a[0] = g.source + g.taps[t].source * g.position_stride;
    if constexpr (kPositions == 2) a[1] = g.source + g.twin_taps[t].source * g.position_stride;
    const char* w = g.weights + g.taps[t].matrix * g.matrix_stride;
    for (int left = g.steps; left > 0; left -= kUnitFloats) {
      if constexpr (kAhead) {
        // Two a unit and not one a step, since a fetch costs time even of a line that is there: seldom are more than
        // two or three lines due in so many steps, and some are left to the processor's own fetching then.
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + ahead_advance / 2, 0, 2);
        ahead += ahead_advance;
      }
      const auto step = [&](int k) __attribute__((always_inline)) {
        typename V::T b[NR];
        DEFGAN_UNROLL(16)
        for (int n = 0; n < NR; ++n)
          b[n] = V::load(reinterpret_cast<const float*>(w + (n / 2) * g.panel_stride) + (n % 2) * V::kLanes);
        if constexpr (NR <= V::kAheadVectors) fetch_soon<V, NR>(w);
        DEFGAN_UNROLL(16)
        for (int m = 0; m < kRows; ++m) {
          const typename V::T x = V::broadcast(reinterpret_cast<const float*>(a[m / M] + (m % M) * kUnitBytes) + k);
          DEFGAN_UNROLL(16)
          for (int n = 0; n < NR; ++n) acc[m][n] = S::mac(acc[m][n], x, b[n]);
        }
        w += kStepBytes;
      };
      if (left >= kUnitFloats) {
        DEFGAN_UNROLL(4)
        for (int k = 0; k < kUnitFloats; ++k) step(k);
      } else {
        for (int k = 0; k < left; ++k) step(k);
      }
      for (int p = 0; p < kPositions; ++p) a[p] += g.unit_stride;
    }
  }
  DEFGAN_UNROLL(16)
  for (int m = 0; m < kRows; ++m) {
    char* row = (m < M ? g.destination : g.twin_destination) + (m % M) * kUnitBytes;
    DEFGAN_UNROLL(16)
    for (int n = 0; n < NR; ++n) {
      if constexpr (E == Epilogue::kRaw) {
        V::store(reinterpret_cast<float*>(row + vector_offset<V, kUnitFloats>(n, g.destination_unit_stride)),
                 acc[m][n]);
      } else {
        char* d = row + vector_offset<V, S::kChannels>(n, g.destination_unit_stride);
        if constexpr (E == Epilogue::kActivate)
          S::store(d, V::select_positive(acc[m][n], acc[m][n], V::mul(acc[m][n], V::all(g.slope))));
        else
          S::store(d, times_derivative<V>(acc[m][n], S::load(d), g.activation, g.slope));
      }
    }
  }
}

// The tile that fetches ahead, or the one that does not.
template <class S, int M, int NR, Epilogue E, int kPositions>
void gemm_kernel(const GemmArgs& g) {
  using V = typename S::V;
  if constexpr (NR <= V::kAheadVectors) {
    if (!V::kAheadChoice || g.ahead) return gemm_tile<S, M, NR, E, kPositions, true>(g);
  }
  if constexpr (NR > V::kAheadVectors || V::kAheadChoice) gemm_tile<S, M, NR, E, kPositions, false>(g);
}

// Y segments of X neighbouring positions, one tap, one row; accumulates in float32.
template <class S, int Y, int X, int NR>
void tap_kernel(const TapArgs& g) {
  using V = typename S::V;
  typename V::T acc[Y * X][NR];
  DEFGAN_UNROLL(16)
  for (int m = 0; m < Y * X; ++m) {
    const char* d = g.destination[m / X] + (m % X) * g.destination_step;
    DEFGAN_UNROLL(16)
    for (int n = 0; n < NR; ++n)
      acc[m][n] =
          V::load(reinterpret_cast<const float*>(d + vector_offset<V, kUnitFloats>(n, g.destination_unit_stride)));
  }
  const char* w = g.weights;
  const char* ahead = g.ahead;
  const int64_t ahead_advance = g.ahead_advance;
  const char* a[Y];
  DEFGAN_UNROLL(4)
  for (int y = 0; y < Y; ++y) a[y] = g.source[y];
  for (int left = g.steps; left > 0; left -= kUnitFloats) {
    const auto step = [&](int k) __attribute__((always_inline)) {
      typename V::T b[NR];
      DEFGAN_UNROLL(16)
      for (int n = 0; n < NR; ++n) b[n] = V::load(reinterpret_cast<const float*>(w) + n * V::kLanes);
      if constexpr (NR <= V::kAheadVectors) {
        fetch_soon<V, NR>(w);
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_advance;
      }
      DEFGAN_UNROLL(16)
      for (int m = 0; m < Y * X; ++m) {
        const typename V::T x = V::broadcast(reinterpret_cast<const float*>(a[m / X] + (m % X) * kUnitBytes) + k);
        DEFGAN_UNROLL(16)
        for (int n = 0; n < NR; ++n) acc[m][n] = S::mac(acc[m][n], x, b[n]);
      }
      w += NR * V::kLanes * 4;
    };
    if (left >= kUnitFloats) {
      DEFGAN_UNROLL(4)
      for (int k = 0; k < kUnitFloats; ++k) step(k);
    } else {
      for (int k = 0; k < left; ++k) step(k);
    }
    DEFGAN_UNROLL(4)
    for (int y = 0; y < Y; ++y) a[y] += g.unit_stride;
  }
  DEFGAN_UNROLL(16)
  for (int m = 0; m < Y * X; ++m) {
    char* d = g.destination[m / X] + (m % X) * g.destination_step;
    DEFGAN_UNROLL(16)
    for (int n = 0; n < NR; ++n)
      V::store(reinterpret_cast<float*>(d + vector_offset<V, kUnitFloats>(n, g.destination_unit_stride)), acc[m][n]);
  }
}

// kSteps steps from `first` on. The weights' lanes are channels of the panel here, not of the sums, so each sum is one of
// lanes in the end.
template <class S, int M, int NR, int kSteps>
void latent_tile(const LatentArgs& g, int first, typename S::V::T (*sums)[M]) {
  using V = typename S::V;
  typename V::T acc[kSteps * S::kStepChannels][M];
  DEFGAN_UNROLL(16)
  for (int c = 0; c < kSteps * S::kStepChannels; ++c) {
    DEFGAN_UNROLL(16)
    for (int m = 0; m < M; ++m) acc[c][m] = V::zero();
  }
  constexpr int kStepBytes = NR * V::kLanes * 4;
  for (int t = 0; t < g.tap_count; ++t) {
    const char* source = g.source + g.taps[t].source * g.position_stride;
    const char* w = g.weights + g.taps[t].matrix * g.matrix_stride + int64_t(first) * kStepBytes;
    // The same tap's next steps, which are read when all taps have had these.
    for (int line = 0; line < kSteps * kStepBytes; line += 64) __builtin_prefetch(w + kSteps * kStepBytes + line, 0, 3);
    DEFGAN_UNROLL(2)
    for (int n = 0; n < NR; ++n) {
      typename V::T x[M];
      DEFGAN_UNROLL(16)
      for (int m = 0; m < M; ++m)
        x[m] = S::load(source + m * kUnitBytes + vector_offset<V, S::kChannels>(n, g.unit_stride));
      DEFGAN_UNROLL(16)
      for (int k = 0; k < kSteps; ++k) {
        const typename V::T b = V::load(reinterpret_cast<const float*>(w + k * kStepBytes) + n * V::kLanes);
        DEFGAN_UNROLL(2)
        for (int c = 0; c < S::kStepChannels; ++c) {
          const typename V::T channel = S::channel_of_step(b, c);
          DEFGAN_UNROLL(16)
          for (int m = 0; m < M; ++m) {
            typename V::T& sum = acc[k * S::kStepChannels + c][m];
            sum = V::fma(channel, x[m], sum);
          }
        }
      }
    }
  }
  DEFGAN_UNROLL(16)
  for (int c = 0; c < kSteps * S::kStepChannels; ++c) {
    DEFGAN_UNROLL(16)
    for (int m = 0; m < M; ++m) sums[first * S::kStepChannels + c][m] = acc[c][m];
  }
}

// M rows; as many steps at once as leave kSums sums in registers.
template <class S, int M, int NR, int kSums>
void latent_kernel(const LatentArgs& g) {
  using V = typename S::V;
  constexpr int kFit = kSums / (M * S::kStepChannels), kMost = kUnitFloats / S::kStepChannels;
  constexpr int kSteps = kFit >= 16 && kMost >= 16 ? 16 : kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  typename V::T sums[kUnitFloats][M];
  int step = 0;
  for (; step + kSteps <= g.steps; step += kSteps) latent_tile<S, M, NR, kSteps>(g, step, sums);
  for (; step < g.steps; ++step) latent_tile<S, M, NR, 1>(g, step, sums);
  for (int c = g.steps * S::kStepChannels; c < kUnitFloats; ++c)
    for (int m = 0; m < M; ++m) sums[c][m] = V::zero();
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < kUnitFloats; c += V::kLanes) {
      typename V::T v[V::kLanes];
      DEFGAN_UNROLL(16)
      for (int i = 0; i < V::kLanes; ++i) v[i] = sums[c + i][m];
      V::store(g.sums + m * kUnitFloats + c, V::sums(v));
    }
}

// Fills a table with every tile that fits the register file: kRows1 rows of one panel, and so on; with kTwins also
// those of two positions, of half as many rows each.
template <class S, int kRows1, int kRows2, int kRows4, bool kTwins>
struct Tiles {
  template <TileWidth kWidth, int M, int kPositions>
  static void rows(GemmKernel (&kernels)[kEpilogues][kTileWidths][kMaxTileRows + 1]) {
    if constexpr (M > 0) {
      constexpr int NR = vectors_of(kWidth);
      kernels[int(Epilogue::kRaw)][kWidth][M] = gemm_kernel<S, M, NR, Epilogue::kRaw, kPositions>;
      kernels[int(Epilogue::kActivate)][kWidth][M] = gemm_kernel<S, M, NR, Epilogue::kActivate, kPositions>;
      kernels[int(Epilogue::kGradient)][kWidth][M] = gemm_kernel<S, M, NR, Epilogue::kGradient, kPositions>;
      rows<kWidth, M - 1, kPositions>(kernels);
    }
  }
  template <int Y, int X>
  static void rectangles(KernelTable& table) {
    if constexpr (X > 0) {
      if constexpr (Y * X <= kRows1) {
        table.tap[kOneVector][Y][X] = tap_kernel<S, Y, X, 1>;
        table.tap[kOnePanel][Y][X] = tap_kernel<S, Y, X, 2>;
      }
      rectangles<Y, X - 1>(table);
    }
  }
  template <int M>
  static void latents(KernelTable& table) {
    if constexpr (M > 0) {
      table.latent[kOneVector][M] = latent_kernel<S, M, 1, 2 * kRows1>;
      table.latent[kOnePanel][M] = latent_kernel<S, M, 2, 2 * kRows1>;
      latents<M - 1>(table);
    }
  }
  static void fill(KernelTable& table) {
    table.lanes = S::V::kLanes;
    table.ahead_bytes = S::V::kAheadChoice ? second_level_cache_bytes() / 2 : 0;
    table.unit_channels = S::kChannels;
    table.max_rows[kOneVector] = table.max_rows[kOnePanel] = kRows1;
    table.max_rows[kTwoPanels] = kRows2;
    table.max_rows[kFourPanels] = kRows4;
    table.step_multiple = 1;
    table.tails = true;
    table.twins = kTwins;
    table.tile_registers = false;
    table.max_segments = kMaxTileSegments;
    table.max_segment = table.max_positions = kRows1;
    rows<kOneVector, kRows1, 1>(table.gemm);
    rows<kOnePanel, kRows1, 1>(table.gemm);
    rows<kTwoPanels, kRows2, 1>(table.gemm);
    rows<kFourPanels, kRows4, 1>(table.gemm);
    if constexpr (kTwins) {
      rows<kOneVector, kRows1 / 2, 2>(table.gemm_twins);
      rows<kOnePanel, kRows1 / 2, 2>(table.gemm_twins);
      rows<kTwoPanels, kRows2 / 2, 2>(table.gemm_twins);
      rows<kFourPanels, kRows4 / 2, 2>(table.gemm_twins);
    }
    table.max_latent_rows = kRows1 / 2;  // more would be too short of steps, and of the first-level cache
    latents<kRows1 / 2>(table);
    rectangles<1, kRows1>(table);
    rectangles<2, kRows1>(table);
    rectangles<3, kRows1>(table);
    rectangles<4, kRows1>(table);
  }
};
