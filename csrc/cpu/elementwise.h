// Everything of a step that is not a matrix product, a template over a storage type; included once by each
// instruction set's file, inside its anonymous namespace and under its target (so the plain loops over the
// 16 channels of a unit are vectorised for that set).

// exp, accurate to about one unit in the last place over the range that matters here: 2^n * e^r with
// |r| <= ln(2)/2 and a Taylor polynomial of degree 7, whose remainder is below 6e-9.
template <class V>
inline typename V::T exponential(typename V::T x) {
  using T = typename V::T;
  x = V::min(V::max(x, V::all(-87.0f)), V::all(88.0f));  // callers restore NaN
  const T n = V::round(V::mul(x, V::all(1.44269504088896341f)));
  T r = V::fma(n, V::all(-0.693145751953125f), x);
  r = V::fma(n, V::all(-1.428606765330187e-06f), r);
  T p = V::all(1.0f / 5040);
  p = V::fma(p, r, V::all(1.0f / 720));
  p = V::fma(p, r, V::all(1.0f / 120));
  p = V::fma(p, r, V::all(1.0f / 24));
  p = V::fma(p, r, V::all(1.0f / 6));
  p = V::fma(p, r, V::all(0.5f));
  p = V::fma(p, r, V::all(1.0f));
  p = V::fma(p, r, V::all(1.0f));
  return V::mul(p, V::power_of_two(n));
}

template <class V>
inline typename V::T sigmoid(typename V::T x) {
  const typename V::T bounded = V::min(V::max(x, V::all(-87.0f)), V::all(87.0f));
  const typename V::T y = V::div(V::all(1.0f), V::add(V::all(1.0f), exponential<V>(V::sub(V::zero(), bounded))));
  return V::select_nan(x, x, y);
}

// Near zero 1 - 2 / (e^2x + 1) cancels, so there an odd polynomial: the Taylor series of tanh up to x^11,
// whose next term, 0.0036 x^13, is below 7e-8 relative for |x| < 0.4.
template <class V>
inline typename V::T hyperbolic_tangent(typename V::T x) {
  using T = typename V::T;
  const T x2 = V::mul(x, x);
  T p = V::all(-1382.0f / 155925);
  p = V::fma(p, x2, V::all(62.0f / 2835));
  p = V::fma(p, x2, V::all(-17.0f / 315));
  p = V::fma(p, x2, V::all(2.0f / 15));
  p = V::fma(p, x2, V::all(-1.0f / 3));
  const T small = V::fma(V::mul(p, x2), x, x);
  const T bounded = V::min(V::max(x, V::all(-20.0f)), V::all(20.0f));
  const T e = exponential<V>(V::add(bounded, bounded));
  const T large = V::sub(V::all(1.0f), V::div(V::all(2.0f), V::add(e, V::all(1.0f))));
  const T y = V::select_positive(V::sub(x2, V::all(0.16f)), large, small);
  return V::select_nan(x, x, y);
}

template <class V>
inline typename V::T activated(typename V::T x, Activation activation, float slope) {
  if (activation == Activation::kSigmoid) return sigmoid<V>(x);
  if (activation == Activation::kTanh) return hyperbolic_tangent<V>(x);
  return V::select_positive(x, x, V::mul(x, V::all(slope)));
}

// Address of float32 unit u (16 channels) at a place, in a buffer of the storage type.
template <class S>
inline char* at(char* units, int u, int64_t place, int64_t places) {
  constexpr int kPer = S::kChannels / kUnitFloats;
  return units + ((u / kPer) * places + place) * kUnitBytes + (u % kPer) * (kUnitBytes / kPer);
}
template <class S>
inline const char* at(const char* units, int u, int64_t place, int64_t places) {
  return at<S>(const_cast<char*>(units), u, place, places);
}

template <class S>
struct Elementwise {
  using V = typename S::V;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kBytes = kUnitBytes / S::kChannels;  // of one channel

  static void store_latent(const float* latent, int k, int rows, int unit_begin, int unit_end, char* units) {
    for (int u = unit_begin; u < unit_end; ++u)
      for (int row = 0; row < rows; ++row) {
        float lanes[kUnitFloats] = {};
        const int count = k - u * kUnitFloats < kUnitFloats ? k - u * kUnitFloats : kUnitFloats;
        for (int c = 0; c < count; ++c) lanes[c] = latent[int64_t(row) * k + u * kUnitFloats + c];
        char* d = at<S>(units, u, row, rows);
        for (int c = 0; c < kUnitFloats; c += kLanes) S::store(d + c * kBytes, V::load(lanes + c));
      }
  }

  static void finish_forward(const FinishArgs& args) {
    const FinishArgs a = args;
    for (int c = a.channel_begin; c < a.channel_end; c += kLanes)
      for (int64_t p = a.place_begin; p < a.place_end; ++p) {
        const float* s = a.sums + ((c / kUnitFloats) * a.places + p) * kUnitFloats + c % kUnitFloats;
        S::store(at<S>(a.stored, c / kUnitFloats, p, a.places) + (c % kUnitFloats) * kBytes,
                 activated<V>(V::load(s), a.activation, a.slope));
      }
  }

  static void finish_gradient(const FinishArgs& args) {
    const FinishArgs a = args;
    for (int c = a.channel_begin; c < a.channel_end; c += kLanes)
      for (int64_t p = a.place_begin; p < a.place_end; ++p) {
        const int offset = (c % kUnitFloats) * kBytes;
        const float* s = a.sums + ((c / kUnitFloats) * a.places + p) * kUnitFloats + c % kUnitFloats;
        const char* h = at<S>(a.stored, c / kUnitFloats, p, a.places) + offset;
        S::store(at<S>(a.delta, c / kUnitFloats, a.order[p], a.places) + offset,
                 times_derivative<V>(V::load(s), S::load(h), a.activation, a.slope));
      }
  }

  static void expand(const char* units, float* wide, int unit_begin, int unit_end, int64_t places) {
    for (int u = unit_begin; u < unit_end; ++u)
      for (int64_t p = 0; p < places; ++p) {
        const char* s = at<S>(units, u, p, places);
        float* d = wide + (u * places + p) * kUnitFloats;
        for (int c = 0; c < kUnitFloats; c += kLanes) V::store(d + c, S::load(s + c * kBytes));
      }
  }

  static void narrow(const float* wide, char* units, int unit_begin, int unit_end, int64_t places) {
    for (int u = unit_begin; u < unit_end; ++u)
      for (int64_t p = 0; p < places; ++p) {
        const float* s = wide + (u * places + p) * kUnitFloats;
        char* d = at<S>(units, u, p, places);
        for (int c = 0; c < kUnitFloats; c += kLanes) S::store(d + c * kBytes, V::load(s + c));
      }
  }

  // Offset of a unit's factors at a position: they are the same at all positions, or each has its own.
  static int64_t factors(int unit, int scale_positions, int position) {
    return (int64_t(unit) * scale_positions + (scale_positions == 1 ? 0 : position)) * kUnitFloats;
  }

  static void map_forward(const MapArgs& args) {
    const MapArgs a = args;
    const int64_t sources = int64_t(a.source_positions) * a.rows, places = int64_t(a.positions) * a.rows;
    for (int u = a.unit_begin; u < a.unit_end; ++u)
      for (int p = 0; p < a.positions; ++p) {
        const int64_t affine = factors(u, a.scale_positions, p);
        for (int row = 0; row < a.rows; ++row) {
          const char* s = at<S>(a.source, u, int64_t(a.from[p]) * a.rows + row, sources);
          char* d = at<S>(a.stored, u, int64_t(p) * a.rows + row, places);
          for (int c = 0; c < kUnitFloats; c += kLanes) {
            const typename V::T x =
                V::fma(S::load(s + c * kBytes), V::load(a.scale + affine + c), V::load(a.shift + affine + c));
            S::store(d + c * kBytes, activated<V>(x, a.activation, a.slope));
          }
        }
      }
  }

  static void map_backward(const MapGradientArgs& args) {
    const MapGradientArgs a = args;
    const PassedGradient& g = a.passed;
    const int64_t sources = int64_t(g.source_positions) * g.rows, places = int64_t(g.positions) * g.rows;
    for (int u = a.unit_begin; u < a.unit_end; ++u)
      for (int i = 0; i < g.source_positions; ++i)
        for (int row = 0; row < g.rows; ++row)
          for (int c = 0; c < kUnitFloats; c += kLanes) {
            typename V::T sum = V::zero();
            for (int t = a.to_begin[i]; t < a.to_begin[i + 1]; ++t) {
              const int o = a.to[t];
              const char* d = at<S>(g.delta, u, int64_t(o) * g.rows + row, places);
              sum = V::fma(S::load(d + c * kBytes), V::load(a.scale + factors(u, a.scale_positions, o) + c), sum);
            }
            const int64_t place = int64_t(i) * g.rows + row;
            if (g.epilogue == Epilogue::kRaw) {
              V::store(reinterpret_cast<float*>(g.destination) + (u * sources + place) * kUnitFloats + c, sum);
            } else {
              char* h = at<S>(g.destination, u, place, sources) + c * kBytes;
              S::store(h, times_derivative<V>(sum, S::load(h), g.activation, g.slope));
            }
          }
  }

  // Offset of one channel of one place. Reorders are rare (a latent viewed as a feature map), so they go element by
  // element.
  static int64_t element(int64_t e, int positions, int row, int rows) {
    const int64_t channel = e / positions, place = (e % positions) * rows + row;
    return ((channel / S::kChannels) * (int64_t(positions) * rows) + place) * kUnitBytes +
           (channel % S::kChannels) * kBytes;
  }
  static void reorder_forward(const ReorderArgs& a) {
    for (int64_t e = a.begin; e < a.end; ++e)
      for (int row = 0; row < a.rows; ++row)
        S::put(a.stored + element(e, a.positions, row, a.rows),
               S::get(a.source + element(e, a.source_positions, row, a.rows)));
  }
  static void reorder_backward(const ReorderGradientArgs& a) {
    const PassedGradient& g = a.passed;
    for (int64_t e = a.begin; e < a.end; ++e)
      for (int row = 0; row < g.rows; ++row) {
        const float value = S::get(g.delta + element(e, g.positions, row, g.rows));
        if (g.epilogue == Epilogue::kRaw) {
          const int64_t channel = e / g.source_positions, place = (e % g.source_positions) * g.rows + row;
          const int64_t unit = channel / kUnitFloats * (int64_t(g.source_positions) * g.rows) + place;
          reinterpret_cast<float*>(g.destination)[unit * kUnitFloats + channel % kUnitFloats] = value;
          continue;
        }
        char* h = g.destination + element(e, g.source_positions, row, g.rows);
        // By the same function as everywhere: a compiler may fuse the products of one written out here.
        float lanes[V::kLanes];
        V::store(lanes, times_derivative<V>(V::all(value), V::all(S::get(h)), g.activation, g.slope));
        S::put(h, lanes[0]);
      }
  }

  static double multiply_adds(int64_t rounds) {
    // Twelve named accumulators: an array would be kept in memory, and the stores would be the limit.
    float values[2][16];
    for (int i = 0; i < 16; ++i) values[0][i] = values[1][i] = 1e-3f;
    const typename V::T x = V::load(values[0]), y = V::load(values[1]);
    typename V::T a = V::zero(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
    const auto step = [&](typename V::T& acc) __attribute__((always_inline)) {
      acc = S::mac(acc, x, y);
      V::keep(acc);
    };
    for (int64_t r = 0; r < rounds * 8; ++r) {
      step(a), step(b), step(c), step(d), step(e), step(f);
      step(g), step(h), step(i), step(j), step(k), step(l);
    }
    V::store(values[0], V::add(V::add(V::add(a, b), V::add(c, d)), V::add(V::add(e, f), V::add(g, h))));
    V::store(values[1], V::add(V::add(i, j), V::add(k, l)));
    return double(rounds) * 8 * 12 * 2.0 * kLanes * (S::kChannels / kUnitFloats) * 1e-9;
  }

  static void fill(KernelTable& table) {
    table.store_latent = store_latent;
    table.finish_forward = finish_forward;
    table.finish_gradient = finish_gradient;
    table.expand = expand;
    table.narrow = narrow;
    table.map_forward = map_forward;
    table.map_backward = map_backward;
    table.reorder_forward = reorder_forward;
    table.reorder_backward = reorder_backward;
    table.multiply_adds = multiply_adds;
  }
};

// The image side, float32 in every precision.
template <class V>
struct Image {
  static constexpr int kLanes = V::kLanes;

  // Calls use(first row, how many as a constant). Four rows share the reading of entries and runs, and their units are
  // neighbours in memory. More were not tried: images of 64x64 pixels lie multiples of 4 KB apart, where the first
  // level has eight places for what is read of all of them.
  template <class Use>
  static void for_rows(int rows, const Use& use) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) use(row, std::integral_constant<int, 4>());
    if (row + 2 <= rows) use(row, std::integral_constant<int, 2>()), row += 2;
    if (row < rows) use(row, std::integral_constant<int, 1>());
  }

  static void forward(const ImageArgs& g) {
    const int64_t stride = int64_t(g.rows) * kUnitFloats;
    for_rows(g.rows, [&](int row, auto count) {
      constexpr int kRows = decltype(count)::value;
      float* image = g.image + int64_t(row) * g.pixel_stride;
      const float* columns = g.columns + int64_t(row) * kUnitFloats;
      for (int p = g.pixel_begin; p < g.pixel_end; ++p) {
        float sums[kRows];
        for (int r = 0; r < kRows; ++r) sums[r] = g.bias ? g.bias[p] : 0.0f;
        for (int e = g.entry_begin[p]; e < g.entry_begin[p + 1]; ++e) {
          const float* s = columns + g.entries[e].slot * stride + g.entries[e].lane;
          for (int r = 0; r < kRows; ++r) sums[r] += s[r * kUnitFloats];
        }
        for (int r = 0; r < kRows; ++r) image[int64_t(r) * g.pixel_stride + p] = sums[r];
      }
    });
    // The padding up to the next vector is activated too: what it holds is finite and never read.
    for (int row = 0; row < g.rows; ++row) {
      float* image = g.image + int64_t(row) * g.pixel_stride;
      for (int p = g.pixel_begin; p < g.pixel_end; p += kLanes)
        V::store(image + p, activated<V>(V::load(image + p), g.activation, g.slope));
    }
  }

  static void gradient(const ImageArgs& g) {
    const typename V::T scale = V::all(2.0f / float(g.pixels));
    for (int row = 0; row < g.rows; ++row) {
      const int64_t start = int64_t(row) * g.pixel_stride;
      for (int p = g.pixel_begin; p < g.pixel_end; p += kLanes) {
        const typename V::T y = V::load(g.image + start + p);
        const typename V::T e = V::mul(scale, V::sub(y, V::load(g.target + start + p)));
        V::store(g.delta + start + p, times_derivative<V>(e, y, g.activation, g.slope));
      }
    }
  }

  static void scatter(const float* delta, int pixel_stride, int rows, const PixelRun* begin, const PixelRun* end,
                      float* columns) {
    const int64_t stride = int64_t(rows) * kUnitFloats;
    for_rows(rows, [&](int row, auto count) {
      const float* from = delta + int64_t(row) * pixel_stride;
      float* to = columns + int64_t(row) * kUnitFloats;
      for (const PixelRun* run = begin; run != end; ++run)
        for (int r = 0; r < decltype(count)::value; ++r) {
          const float* s = from + int64_t(r) * pixel_stride + run->pixel;
          float* d = to + run->slot * stride + r * kUnitFloats + run->lane;
          int left = run->count;
          for (; left >= 4; left -= 4, s += 4, d += 4) __builtin_memcpy(d, s, 16);
          for (; left > 0; --left) *d++ = *s++;
        }
    });
  }

  static float error(const float* image, const float* target, int pixels) {
    // Sixteen partial sums whatever the vector width, added in a fixed order.
    float partial[kUnitFloats] = {};
    int p = 0;
    for (; p + kUnitFloats <= pixels; p += kUnitFloats)
      for (int c = 0; c < kUnitFloats; c += kLanes) {
        const typename V::T e = V::sub(V::load(image + p + c), V::load(target + p + c));
        V::store(partial + c, V::fma(e, e, V::load(partial + c)));
      }
    double sum = 0;
    for (; p < pixels; ++p) sum += double(image[p] - target[p]) * double(image[p] - target[p]);
    for (int c = 0; c < kUnitFloats; ++c) sum += double(partial[c]);
    return float(sum / pixels);
  }

  static void update(const UpdateArgs& args) {
    const UpdateArgs a = args;
    for (int u = a.unit_begin; u < a.unit_end; ++u)
      for (int row = 0; row < a.rows; ++row) {
        const float* g = a.gradient + (int64_t(u) * a.rows + row) * kUnitFloats;
        const int64_t start = int64_t(row) * a.k + u * kUnitFloats;
        const int count = a.k - u * kUnitFloats < kUnitFloats ? a.k - u * kUnitFloats : kUnitFloats;
        for (int c = 0; c < count; ++c) {
          a.velocity[start + c] = a.momentum * a.velocity[start + c] + g[c];
          a.latent[start + c] -= a.rate * a.velocity[start + c];
        }
      }
  }

  static void fill(ImageKernels& kernels) {
    kernels.forward = forward;
    kernels.gradient = gradient;
    kernels.scatter = scatter;
    kernels.error = error;
    kernels.update = update;
  }
};
