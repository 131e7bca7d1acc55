// Packing: from the generator's parameters to the matrices and vectors that kernels read, norms folded, taps of one
// set summed. Done anew by every call: it costs about as much as one step, and no change of a weight, however it was
// made, can be missed; a cache would have to compare bytes, which means waiting for the device.
#pragma once

#include "layout.h"

namespace defgan::cuda {

DEFGAN_DEVICE float norm_scale(const PackParams& p, int gamma, int var, float eps, int at) {
  const float scale = gamma == kNone ? 1.0f : load_constant(p.parameters[gamma] + at);
  return scale / square_root(load_constant(p.parameters[var] + at) + eps);
}

// The element of a packed matrix: its taps' sum.
DEFGAN_DEVICE float packed_weight(const PackParams& p, const Pack& pack, const int32_t* index, int matrix, int row,
                                  int column) {
  const int32_t at = load_constant(index + pack.row_offset + row);
  const int32_t to = load_constant(index + pack.column_offset + column);
  if (at == kNone || to == kNone) return 0.0f;
  int set = matrix;
  if (pack.set_from == SetFrom::kRow) set = load_constant(index + pack.row_set + row);
  if (pack.set_from == SetFrom::kColumn) set = load_constant(index + pack.column_set + column);
  float scale = 1.0f;
  if (pack.var != kNone) {
    const int32_t by_row = load_constant(index + pack.row_norm + row);
    const int32_t norm = by_row != kNone ? by_row : load_constant(index + pack.column_norm + column);
    scale = norm_scale(p, pack.gamma, pack.var, pack.eps, norm + load_constant(index + pack.set_norm + set));
  }
  const float* weight = p.parameters[pack.weight] + at + to;
  float sum = 0;
  const int32_t end = load_constant(index + pack.set_begin + set + 1);
  for (int32_t t = load_constant(index + pack.set_begin + set); t < end; ++t)
    sum += load_constant(weight + load_constant(index + pack.set_taps + t)) * scale;
  return sum;
}

DEFGAN_DEVICE float packed_vector(const PackParams& p, const PackVector& v, const int32_t* index, int i) {
  const int32_t element = load_constant(index + v.element + i), norm = load_constant(index + v.norm + i);
  if (element == kNone) return v.fill;
  const float given =
      v.kind == VectorKind::kBias && v.bias != kNone ? load_constant(p.parameters[v.bias] + element) : 0.0f;
  if (v.mean == kNone) return given;
  const float scale = norm_scale(p, v.gamma, v.var, v.eps, norm);
  if (v.kind == VectorKind::kScale) return scale;
  const float beta = v.beta == kNone ? 0.0f : load_constant(p.parameters[v.beta] + norm);
  const float shift = beta - load_constant(p.parameters[v.mean] + norm) * scale;
  return v.kind == VectorKind::kShift ? shift : given * scale + shift;
}

// The piece of 8 elements (one lane's part of a fragment) with number `piece`.
template <class S>
DEFGAN_DEVICE void pack_piece(const PackParams& p, const Pack& pack, const int32_t* index, int piece) {
  const int lane = piece % kLanes;
  const int fragment = piece / kLanes;
  const int row_tiles = pack.rows / 16, column_tiles = pack.columns / 16;
  const int column = fragment % column_tiles * 16 + lane % 4 * 2;
  const int row = fragment / column_tiles % row_tiles * 16 + lane / 4;
  const int matrix = fragment / column_tiles / row_tiles;
  uint32_t words[4];
  for (int j = 0; j < 4; ++j) {
    const int m = row + j % 2 * 8, k = column + j / 2 * 8;
    words[j] = pack2<S>(packed_weight(p, pack, index, matrix, m, k), packed_weight(p, pack, index, matrix, m, k + 1));
  }
  store_global(reinterpret_cast<Vec4*>(p.weights + pack.weights) + piece, Vec4{words[0], words[1], words[2], words[3]});
}

template <>
DEFGAN_DEVICE void pack_piece<float>(const PackParams& p, const Pack& pack, const int32_t* index, int piece) {
  const int part = piece % 4;
  const int line = piece / 4;
  const int column = line % pack.columns, row_blocks = pack.rows / kChunk;
  const int row = line / pack.columns % row_blocks * kChunk + part * kPiece;
  const int matrix = line / pack.columns / row_blocks;
  float v[kPiece];
  for (int j = 0; j < kPiece; ++j) v[j] = packed_weight(p, pack, index, matrix, row + j, column);
  Float4* to = reinterpret_cast<Float4*>(p.weights + pack.weights) + int64_t(piece) * 2;
  store_global(to, Float4{v[0], v[1], v[2], v[3]});
  store_global(to + 1, Float4{v[4], v[5], v[6], v[7]});
}

template <class S>
DEFGAN_DEVICE void pack_kernel(const PackParams& p) {
  if (p.wanted != nullptr && load_constant(p.wanted) == 0) return;
  const Header h = load_table<Header>(p.tables);
  const int32_t* index = reinterpret_cast<const int32_t*>(p.tables + h.index);
  const int threads = block_count() * block_threads();
  const int first = block_index() * block_threads() + thread_index();
  for (int n = 0; n < h.pack_count; ++n) {
    const Pack pack = load_table<Pack>(p.tables + h.packs + n * sizeof(Pack));
    const int pieces = int(pack.elements / kPiece);
    for (int piece = first; piece < pieces; piece += threads) pack_piece<S>(p, pack, index, piece);
  }
  for (int n = 0; n < h.vector_count; ++n) {
    const PackVector v = load_table<PackVector>(p.tables + h.vectors + n * sizeof(PackVector));
    for (int i = first; i < v.count; i += threads)
      store_global(p.vectors + v.destination + i, packed_vector(p, v, index, i));
  }
}

}  // namespace defgan::cuda
