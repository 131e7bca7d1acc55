// A plan as the kernels run it: a list of stages over the buffers of a group of rows, in plain structs and index
// tables that are copied to the device as they stand.
//
// A group is 8 rows (pairs of image and restart), the columns of one tensor-core tile. Every group has the same
// buffers: the input of each layer, the last layer's float32 sums, the image's gradient. One step of the descent is:
// each layer forward, the image (sums -> gradient of the error), that gradient spread over the last layer's
// columns, each layer backward. A gradient overwrites the activation that it belongs to, and the last one updates the
// latent.
//
// The order in which every sum is taken is fixed here, in the tables, so that all mappings give the same bits.
#pragma once

#include "../geometry.h"
#include "enqueue.h"

namespace defgan::cuda {

constexpr int kGroupRows = 8;
constexpr int kChunk = 32;           // channels of a block of storage (layout.h); channels are padded to whole ones
constexpr int kMaxParameters = 256;  // their addresses travel as kernel arguments
constexpr int kChains = 4;           // partial sums of a long dot product (Stage::chains)
constexpr int kMinChainChunks = 32;  // dot products of fewer chunks are taken in one chain
constexpr int kSourceUnit = 256;     // bytes; every buffer and every block of storage begins at a multiple
constexpr int kStagedClasses = 64;   // of a stage, which travel with it
constexpr int kNone = -1;

enum class StageKind : int32_t { kGemm, kMap, kReorder, kImage, kSpread };

enum class Epilogue : int32_t {
  kActivate,  // bias, activation; stored
  kSums,      // float32, to the sums of the image
  kGradient,  // times the derivative that the stored activation tells; written over it
  kUpdate,    // the latent's gradient: one momentum step
};

// Destination positions that are fed by the same matrices: those of one phase. A source that is missing at a border is
// the group's buffer of zeros: a product with it costs less than asking.
struct alignas(16) PositionClass {
  int32_t taps, positions;
  int32_t matrix;    // table: the matrix of each tap, in the order of summation
  int32_t source;    // table: [tap][position], where the source is in a group's buffers, in kSourceUnit bytes
  int32_t position;  // table: the destination positions
  int32_t pad[3];
};

// One stage. Table fields are offsets, in elements of int32, into the index table.
struct alignas(16) Stage {
  StageKind kind;
  Epilogue epilogue;
  int32_t activation;  // of kActivate; of the layer below for kGradient; of the last layer for kImage
  float slope;
  int64_t source, destination;  // bytes into a group's buffers
  int32_t destination_positions;
  int32_t source_chunks, destination_chunks;
  int32_t source_channels;  // unpadded, for kernels that need no padding
  // kGemm
  int64_t weights;  // bytes into the packed weights
  int32_t classes, class_count;
  int32_t chains;
  int32_t bias, bias_stride;  // floats into the packed vectors; stride between positions, 0: the same at all
  // kMap: forward reads from[destination]; backward sums over to[to_begin[p] .. to_begin[p + 1]).
  // kReorder and kSpread: index[position][channel]: source position * channels + channel, or the pixel; or kNone.
  int32_t index, index_begin;
  int32_t scale, shift, scale_stride;  // floats into the packed vectors, as the bias
  int32_t backward;
  // kImage: pixel p is the bias plus sums[entry[begin[p]] .. entry[begin[p + 1]]), offsets in floats
  int32_t pixels;
  int32_t pad[2];
};

// A stage and its first classes, as they are brought to shared memory.
struct alignas(16) StageRecord {
  Stage stage;
  PositionClass classes[kStagedClasses];
};

// What tells which set of kernel elements a number of a packed matrix sums.
enum class SetFrom : int32_t {
  kMatrix,  // its matrix
  kRow,     // its row (row_set): columns forward
  kColumn,  // its column (column_set): columns backward
};

// What packing does for one stage: which elements of which parameter make up its matrices.
struct alignas(16) Pack {
  int64_t weights;                    // bytes, destination
  int64_t elements;                   // to write
  int32_t weight;                     // parameter
  int32_t matrices, rows, columns;    // padded: destination channels, source channels
  int32_t row_offset, column_offset;  // tables: element offset in the parameter, kNone for padding
  int32_t row_norm, column_norm;      // tables: index into the norm's vectors, kNone where the other one has it
  SetFrom set_from;
  int32_t row_set, column_set;
  int32_t set_begin, set_taps, set_norm;
  int32_t mean, var, gamma;  // parameters of the norm, kNone: no norm
  float eps;
  int32_t pad[2];
};

// What a packed vector holds.
enum class VectorKind : int32_t {
  kBias,   // biases, a norm folded into them
  kScale,  // a norm's scales
  kShift,  // and its shifts
};

// What packing does for one of the packed vectors.
struct alignas(16) PackVector {
  int32_t destination, count;  // floats
  int32_t element;             // table: index into the bias parameter, kNone for padding (then `fill`)
  int32_t norm;                // table: index into the norm's vectors
  int32_t bias, mean, var, gamma, beta;
  VectorKind kind;
  float eps, fill;
};

struct alignas(16) Header {
  int64_t stages, packs, vectors, classes, index;  // bytes into the blob; stages: StageRecord
  int32_t forward_stages, all_stages;              // kImage is the last of the forward ones
  int32_t pack_count, vector_count;
  int64_t group_bytes;              // of one group's buffers
  int64_t latent, velocity, image;  // bytes into them: float32 [k][8], [k][8], [pixel][8]
  int64_t zero;                     // and of the zeros that stand for missing sources, zero_bytes of them
  int32_t zero_bytes;
  int32_t latent_size, latent_chunks, pixels;
  float gradient_scale;  // 2 / pixels: of the mean squared error, applied at the update
  int32_t pad[3];
};

class Program {
 public:
  Program(const Plan& plan, const std::vector<int64_t>& elements, Precision precision);

  Plan plan;
  Precision precision;
  Header header{};
  std::vector<Stage> stages;
  std::vector<Pack> packs;
  std::vector<PackVector> vectors;
  std::vector<PositionClass> classes;
  std::vector<int32_t> index;
  int64_t weight_bytes = 0, vector_floats = 0;
  // This program's tables, then those of `exact` where there is one.
  std::vector<char> tables;
  // Of a precision with fewer than 32 bits: evaluates the final error and decodes.
  std::shared_ptr<const Program> exact;

  int element_bytes() const { return precision == Precision::kFloat32 ? 4 : 2; }
  const Program& float32() const { return exact ? *exact : *this; }
};

// Bytes into the tables where those of program.float32() begin.
inline int64_t exact_tables_offset(const Program& program) {
  return program.exact ? int64_t(program.tables.size() - program.exact->tables.size()) : 0;
}

}  // namespace defgan::cuda
