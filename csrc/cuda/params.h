// What the host hands to each kernel: plain structs of device pointers and sizes.
#pragma once

#include "../descent.h"
#include "device_types.h"
#include "program.h"

namespace defgan::cuda {

constexpr int kLanes = 32;  // a warp's threads
constexpr int kPiece = 8;   // the numbers of a block of storage that belong to one lane
constexpr int kPackThreads = 256, kTeamThreads = 256, kFusedThreads = 256, kKeepThreads = 128;

// What the stages read of the tables, in shared memory. While one stage runs, the next one's record is on its way.
constexpr int kMaxChoices =
    128;  // the tiles of so many stages are chosen once; a longer plan's later ones in each step
struct TeamTables {
  Header header;
  StageRecord stages[2];
  int32_t choice[kMaxChoices];
};
constexpr int kTeamSharedBytes = sizeof(TeamTables);

// Counts are int32, which the host makes sure of: 64-bit divisions are subroutine calls on a GPU, and would cost the
// callers registers. Only offsets in bytes are int64.

// What is the same for every row of a call, and where its rows are.
struct Call {
  const float* images;      // [B, pixels]
  const float* start;       // latents [R, k] or [B, R, k]
  int32_t rows, first_row;  // where this launch's rows end, and where they begin, in the rows of the whole call
  int32_t restarts;
  int32_t start_per_image;
  Descent descent;
  const float* velocities;  // [rows, k], with which the descent goes on; nullptr: it begins, with velocities of zero
  float* latents;           // out: [rows, k]
  float* velocities_out;    // out: [rows, k], or nullptr
};

struct PackParams {
  const char* tables;
  char* weights;
  float* vectors;
  const float* parameters[kMaxParameters];
  const uint32_t* wanted;  // 0 there: the kernel does nothing; nullptr: it does its work
};

enum class Purpose : int32_t {
  kDescend,  // all steps; writes the latents
  kErrors,   // float32: one forward pass from the given latents, writes each row's mean squared error
  kDecode,   // float32: one forward pass, writes the images
};

struct TeamParams {
  const char* tables;
  const char* weights;
  const float* vectors;
  char* groups;           // the buffers of every group in flight
  TeamBarrier* barriers;  // one a team, zero
  int32_t teams, blocks_per_team;
  int32_t group_count;  // in flight
  Purpose purpose;
  Call call;
  float* errors;           // [rows]
  float* decoded;          // [rows, pixels]
  const uint32_t* wanted;  // as in PackParams
};

struct FusedParams {
  // Packed matrices of the stages, forward then backward; all [matrix][row tile][column tile][lane].
  const char *linear, *first, *second, *columns, *columns_back, *second_back, *first_back, *linear_back;
  const float *linear_bias, *first_bias, *second_bias;  // [position][channels], [channels], [channels]
  const float* image_bias;                              // [pixels], or nullptr
  int32_t linear_bias_stride;
  float gradient_scale;
  Call call;
};

// The end of a leg of a descent from which only some rows go on.
struct KeepParams {
  int32_t images, rows;  // rows of each image in the leg
  int32_t kept;          // that go on; 0: none, it was the last leg
  int32_t latent_size, restarts;
  int32_t steps;  // that these rows have taken
  // Of the leg's rows [images * rows]: where they are, and which restart each is (nullptr: they are in order).
  const float *latents, *velocities, *errors;
  const int32_t* restart;
  int32_t *ranks, *places;  // working memory, [images * rows]
  // out, [images * kept]: those that go on
  float *next_latents, *next_velocities;
  int32_t* next_restart;
  // out, [images * restarts]: the leg's rows where they have stopped
  float *all_latents, *all_errors;
  int64_t* all_steps;
};

}  // namespace defgan::cuda
