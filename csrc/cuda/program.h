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
constexpr int kChunk = 32;           // channels of a block of storage (layout.h); every layer is padded to whole chunks
constexpr int kMaxParameters = 256;  // the parameters' addresses travel as kernel arguments
constexpr int kChains = 4;           // a long dot product is taken in this many partial sums (Stage::chains)
constexpr int kMinChainChunks = 32;  // a dot product of fewer chunks is taken in one
constexpr int kSourceUnit = 256;     // bytes; every buffer and every block of storage begins at a multiple of it
constexpr int kStagedClasses = 64;   // so many classes travel with their stage (StageRecord)
constexpr int kNone = -1;

enum class StageKind : int32_t { kGemm, kMap, kReorder, kImage, kSpread };

// What a stage does with a number that it has summed.
enum class Epilogue : int32_t {
  kActivate,  // adds the bias, applies the activation, stores it
  kSums,      // stores it as one of the float32 sums that pixels are made of
  kGradient,  // multiplies it by the derivative at the stored activation, and overwrites that
  kUpdate,    // takes it as the latent's gradient, for one momentum step
};

// A class is the destination positions that are fed by the same matrices: those of one phase. Where a source is missing
// at a border, the table has the group's buffer of zeros: a product with it costs less than a branch.
struct alignas(16) PositionClass {
  int32_t taps, positions;
  int32_t matrix;    // table: the matrix of each tap, in the order of summation
  int32_t source;    // table: [tap][position], the source's offset into a group's buffers, in units of kSourceUnit
  int32_t position;  // table: the destination positions
  int32_t pad[3];
};

// A stage is a layer in one direction, the image, or the spreading of its gradient. Fields that say "table" are offsets
// into the index table, in elements.
struct alignas(16) Stage {
  StageKind kind;
  Epilogue epilogue;
  int32_t activation;  // the layer's own for kActivate; the layer's below for kGradient; the last layer's for kImage
  float slope;
  int64_t source, destination;  // bytes into a group's buffers
  int32_t destination_positions;
  int32_t source_chunks, destination_chunks;
  int32_t source_channels;  // without padding, most of which the float32 tiles skip
  // of kGemm
  int64_t weights;  // bytes into the packed weights
  int32_t classes, class_count;
  int32_t chains;
  int32_t bias, bias_stride;  // floats into the packed vectors; from position to position, 0 where all share one
  // index, table. kMap forward: the source of each destination position. kMap backward: the readers of position p are
  // numbers index_begin[p] to index_begin[p + 1]. kReorder and kSpread: for each position and padded channel the source
  // position * padded channels + channel, or the pixel, or kNone. kImage: the offsets, in floats, of the sums that make
  // pixel p, numbers index_begin[p] to index_begin[p + 1].
  int32_t index, index_begin;
  int32_t scale, shift, scale_stride;  // of kMap: floats into the packed vectors, as for the bias
  int32_t backward;                    // whether it computes a gradient
  int32_t pixels;                      // of kImage
  int32_t pad[2];
};

// A stage with its first classes, as kernels bring it to shared memory.
struct alignas(16) StageRecord {
  Stage stage;
  PositionClass classes[kStagedClasses];
};

// What decides which set of kernel elements a number of a packed matrix sums.
enum class SetFrom : int32_t {
  kMatrix,  // the matrix that it is in
  kRow,     // its row (row_set): the last layer's columns, forward
  kColumn,  // its column (column_set): the last layer's columns, backward
};

// What packing does for one stage: which elements of which parameter make up its matrices.
struct alignas(16) Pack {
  int64_t weights;                    // where the matrices begin, bytes into the packed weights
  int64_t elements;                   // how many numbers are written
  int32_t weight;                     // the parameter's number
  int32_t matrices, rows, columns;    // rows are destination channels, columns source channels, both padded
  int32_t row_offset, column_offset;  // tables: offset of elements in the parameter, kNone for padding
  int32_t row_norm, column_norm;      // tables: index into the norm's vectors, kNone where the other side has it
  SetFrom set_from;
  int32_t row_set, column_set;            // tables: the set of each row or column, where set_from says so
  int32_t set_begin, set_taps, set_norm;  // tables: a set's first element, the elements' offsets, a set's norm index
  int32_t mean, var, gamma;               // numbers of the norm's parameters, kNone where there is no norm
  float eps;
  int32_t pad[2];
};

// What a packed vector holds.
enum class VectorKind : int32_t {
  kBias,   // a layer's biases, with the norm folded into them
  kScale,  // the scales of a norm that stands alone
  kShift,  // the shifts of a norm that stands alone
};

// What packing does for one of the packed vectors.
struct alignas(16) PackVector {
  int32_t destination, count;            // floats into the packed vectors
  int32_t element;                       // table: index into the bias parameter, kNone for padding (then `fill`)
  int32_t norm;                          // table: index into the norm's vectors
  int32_t bias, mean, var, gamma, beta;  // numbers of parameters, kNone where there is none
  VectorKind kind;
  float eps, fill;
};

// The tables begin with this.
struct alignas(16) Header {
  int64_t stages, packs, vectors, classes, index;  // where each table begins, in bytes; that of stages has StageRecords
  int32_t forward_stages, all_stages;              // the image is the last of the forward ones
  int32_t pack_count, vector_count;
  int64_t group_bytes;              // the size of one group's buffers
  int64_t latent, velocity, image;  // bytes into the buffers: float32 [k][8], float32 [k][8], [pixel][8]
  int64_t zero;                     // bytes into the buffers: zero_bytes of zeros, which stand for missing sources
  int32_t zero_bytes;
  int32_t latent_size, latent_chunks, pixels;
  float gradient_scale;  // 2 / pixels, the mean's factor of the squared error, applied at the update
  int32_t pad[3];
};

// A plan compiled for one precision (enqueue.h says what it depends on).
class Program {
 public:
  Program(const Plan& plan, const std::vector<int64_t>& elements, Precision precision);

  Plan plan;
  Precision precision;
  Header header{};
  // Layer by layer forward, the image, the spreading of its gradient, layer by layer backward from the last one.
  std::vector<Stage> stages;
  std::vector<Pack> packs;
  std::vector<PackVector> vectors;
  std::vector<PositionClass> classes;
  std::vector<int32_t> index;
  int64_t weight_bytes = 0, vector_floats = 0;
  // This program's tables, then those of `exact` where there is one.
  std::vector<char> tables;
  // The same plan in float32, which evaluates the final error and decodes; null where this is float32 already.
  std::shared_ptr<const Program> exact;

  // The stages by name.
  const Stage& forward(int layer) const { return stages[size_t(layer)]; }
  const Stage& image() const { return stages[size_t(layers())]; }
  const Stage& backward(int layer) const { return stages[size_t(2 * layers() + 1 - layer)]; }

  int layers() const { return int(plan.layers.size()); }
  int element_bytes() const { return precision == Precision::kFloat32 ? 4 : 2; }
  const Program& float32() const { return exact ? *exact : *this; }
};

// Bytes into the tables where those of program.float32() begin.
inline int64_t exact_tables_offset(const Program& program) {
  return program.exact ? int64_t(program.tables.size() - program.exact->tables.size()) : 0;
}

}  // namespace defgan::cuda
