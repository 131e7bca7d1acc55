// The kernel of nearest_kernels.h over a vector type of whole numbers; included once by each instruction set's file,
// inside its anonymous namespace and under its target.
//
// Lanes are candidates. In registers: the sums of kImages images with the group's candidates, 32 bits a lane, for
// kExactPairs pairs of pixels; then they are added to 64-bit sums in the caller's memory. A group (25 KB at 28x28) stays in
// the first or second level of the cache while all images pass by, so candidates are read from memory once a call.

template <class V, int kImages>
void accumulate(const int32_t* images, int64_t stride, const int16_t* group, int64_t begin, int64_t end,
                int64_t* products) {
  constexpr int kVectors = kCandidateGroup / V::kLanes;
  typename V::T sums[kImages][kVectors];
  for (int i = 0; i < kImages; ++i)
    for (int v = 0; v < kVectors; ++v) sums[i][v] = V::zero();
  for (int64_t pair = begin; pair < end; ++pair) {
    typename V::T candidates[kVectors];
    for (int v = 0; v < kVectors; ++v) candidates[v] = V::load(group + (pair * kCandidateGroup + v * V::kLanes) * 2);
    for (int i = 0; i < kImages; ++i) {
      const typename V::T image = V::all(images[i * stride + pair]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = V::add(sums[i][v], V::multiply_pairs(image, candidates[v]));
    }
  }
  for (int i = 0; i < kImages; ++i)
    for (int v = 0; v < kVectors; ++v) {
      int32_t lanes[V::kLanes];
      V::store(lanes, sums[i][v]);
      for (int lane = 0; lane < V::kLanes; ++lane) products[i * kCandidateGroup + v * V::kLanes + lane] += lanes[lane];
    }
}

template <class V, int kImages>
void products_of(const CandidateProducts& p, int64_t first) {
  const int32_t* images = p.images + first * p.pairs;
  int64_t* products = p.products + first * kCandidateGroup;
  for (int i = 0; i < kImages * kCandidateGroup; ++i) products[i] = 0;
  for (int64_t begin = 0; begin < p.pairs; begin += nearest::kExactPairs) {
    const int64_t end = begin + nearest::kExactPairs < p.pairs ? begin + nearest::kExactPairs : p.pairs;
    accumulate<V, kImages>(images, p.pairs, p.group, begin, end, products);
  }
}

template <class V, int kImages>
void all_products(const CandidateProducts& p) {
  int64_t i = 0;
  for (; i + kImages <= p.count; i += kImages) products_of<V, kImages>(p, i);
  for (; i < p.count; ++i) products_of<V, 1>(p, i);
}
