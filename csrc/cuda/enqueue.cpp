#include "queue.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "geometries.h"

namespace defgan::cuda {
namespace {

// Activations of all rows in flight, where max_rows does not say otherwise.
constexpr int64_t kWorkingBytes = int64_t(200) << 20;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t groups_of(int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }

template <class G>
bool has_geometry(const Plan& plan) {
  const auto same = [](const Shape& s, int c, int h) { return s.c == c && s.h == h && s.w == h; };
  const auto& l = plan.layers;
  if (l.size() != 4 || plan.image.c != 1 || plan.image.h != G::kH3 || plan.image.w != G::kH3) return false;
  for (size_t n = 0; n < 4; ++n) {
    if (l[n].norm.present() || l[n].kind != (n == 0 ? Kind::kLinear : Kind::kConvTranspose)) return false;
    if (l[n].activation != (n == 3 ? Activation::kSigmoid : Activation::kRelu)) return false;
    if (n == 0) continue;
    const auto both = [](const Pair& p, int value) { return p.h == value && p.w == value; };
    if (!both(l[n].kernel, G::kKernel) || !both(l[n].stride, 2) || !both(l[n].pad, G::kPad)) return false;
  }
  return l[0].in.c == G::kLatent && same(l[0].out, G::kC0, G::kH0) && same(l[1].out, G::kC1, G::kH1) &&
         same(l[2].out, G::kC2, G::kH2) && same(l[3].out, 1, G::kH3);
}

// Index of the plan's fused geometry, or kNone.
int geometry_of(const Plan& plan) {
  int found = kNone;
  for (int n = 0; n < kGeometries; ++n)
    with_geometry(n, [&](auto g) {
      if (has_geometry<decltype(g)>(plan)) found = n;
    });
  return found;
}

size_t fused_shared_bytes(int geometry) {
  size_t bytes = 0;
  with_geometry(geometry, [&](auto g) { bytes = decltype(g)::kSharedBytes; });
  return bytes;
}

// Rows of one launch whose buffers are in global memory. Kernels count what they hold in int32, by words of 8 bytes.
int64_t rows_per_launch(const Program& program, int64_t rows, int64_t max_rows) {
  const auto fitting = [&](int64_t bytes) {
    return std::max<int64_t>(1, bytes / program.header.group_bytes) * kGroupRows;
  };
  return std::max<int64_t>(
      1, std::min({rows, max_rows > 0 ? max_rows : fitting(kWorkingBytes), fitting(int64_t(8) << 30)}));
}

// The workspace's parts, in order. Every pass has its own weights, the passes share the buffers of the groups.
struct Workspace {
  size_t weights, vectors, exact_weights, exact_vectors, barriers, groups, bytes;
};

Workspace lay_out(const Program& program, const Schedule& s, bool descend) {
  const Program& exact = program.float32();
  size_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const size_t here = at;
    at += size_t(round_up(bytes, 256));
    return here;
  };
  Workspace w{};
  w.exact_weights = take(exact.weight_bytes);
  w.exact_vectors = take(exact.vector_floats * 4);
  w.weights = w.exact_weights;
  w.vectors = w.exact_vectors;
  if (descend && &exact != &program) {
    w.weights = take(program.weight_bytes);
    w.vectors = take(program.vector_floats * 4);
  }
  w.barriers = take(int64_t(std::max(s.teams, 1)) * int64_t(sizeof(TeamBarrier)));
  int64_t buffers = groups_of(s.exact_rows_in_flight) * exact.header.group_bytes;
  if (descend && s.mapping != Mapping::kFused)
    buffers = std::max(buffers, groups_of(s.rows_in_flight) * program.header.group_bytes);
  w.groups = take(buffers);
  w.bytes = at;
  return w;
}

void pack(Queue& queue, const Program& program, const char* tables, const std::vector<Parameter>& parameters,
          const Schedule& s, char* weights, char* vectors, const uint32_t* wanted = nullptr) {
  PackParams p{};
  p.tables = tables;
  p.weights = weights;
  p.vectors = reinterpret_cast<float*>(vectors);
  p.wanted = wanted;
  for (size_t i = 0; i < parameters.size(); ++i) p.parameters[i] = parameters[i].data;
  int64_t most = 1;
  for (const Pack& one : program.packs) most = std::max(most, one.elements / kPiece);
  const int blocks = int(std::min<int64_t>((most + kPackThreads - 1) / kPackThreads, s.exact_blocks * 4));
  queue.launch({KernelId::kPack, program.precision, 0, &p, blocks, kPackThreads, 0, false});
}

// One pass of the team kernel over all rows, in as many launches as the schedule's rows in flight make.
void run_teams(Queue& queue, const Program& program, TeamParams p, int64_t rows_in_flight, int teams,
               int blocks_per_team) {
  for (int64_t first = 0; first < p.call.rows; first += rows_in_flight) {
    const int64_t end = std::min<int64_t>(p.call.rows, first + rows_in_flight);
    TeamParams part = p;
    part.call.first_row = int32_t(first);
    part.call.rows = int32_t(end);
    part.group_count = int(groups_of(end - first));
    part.teams = std::min(teams, part.group_count);
    part.blocks_per_team = blocks_per_team;
    queue.clear(p.barriers, size_t(part.teams) * sizeof(TeamBarrier));
    queue.launch({KernelId::kTeam, program.precision, 0, &part, part.teams * blocks_per_team, kTeamThreads,
                  kTeamSharedBytes, true});
  }
}

void run_fused(Queue& queue, const Program& program, const char* weights, const float* vectors, const Call& call,
               int64_t rows_in_flight) {
  const int geometry = geometry_of(program.plan);
  const auto matrices = [&](const Stage& stage) { return weights + stage.weights; };
  const auto bias = [&](const Stage& stage) { return stage.bias == kNone ? nullptr : vectors + stage.bias; };
  FusedParams p{};
  p.linear = matrices(program.forward(0));
  p.first = matrices(program.forward(1));
  p.second = matrices(program.forward(2));
  p.columns = matrices(program.forward(3));
  p.columns_back = matrices(program.backward(3));
  p.second_back = matrices(program.backward(2));
  p.first_back = matrices(program.backward(1));
  p.linear_back = matrices(program.backward(0));
  p.linear_bias = bias(program.forward(0));
  p.linear_bias_stride = program.forward(0).bias_stride;
  p.first_bias = bias(program.forward(1));
  p.second_bias = bias(program.forward(2));
  p.image_bias = bias(program.image());
  p.gradient_scale = program.header.gradient_scale;
  for (int64_t first = 0; first < call.rows; first += rows_in_flight) {
    const int64_t end = std::min<int64_t>(call.rows, first + rows_in_flight);
    p.call = call;
    p.call.first_row = int32_t(first);
    p.call.rows = int32_t(end);
    queue.launch({KernelId::kFused, program.precision, geometry, &p, int(groups_of(end - first)), kFusedThreads,
                  fused_shared_bytes(geometry), false});
  }
}

}  // namespace

const char* name_of(Mapping mapping) {
  switch (mapping) {
    case Mapping::kAuto: return "auto";
    case Mapping::kFused: return "fused";
    case Mapping::kLayered: return "layered";
    case Mapping::kSplit: return "split";
  }
  return "?";
}

Schedule schedule_projection(const Program& program, const Device& device, int64_t rows, int64_t max_rows,
                             Mapping wanted) {
  if (device.major < 8)
    throw std::invalid_argument("the CUDA kernels need a device of compute capability 8.0 or later, got " +
                                std::to_string(device.major) + "." + std::to_string(device.minor));
  if (rows > std::numeric_limits<int32_t>::max() - kGroupRows)
    throw std::invalid_argument("images times restarts must be below 2^31 on CUDA, got " + std::to_string(rows));
  Schedule s;
  const int64_t groups = groups_of(rows);
  const int processors = std::max(device.multiprocessors, 1);
  std::string unfused;
  const int geometry = geometry_of(program.plan);
  if (program.precision == Precision::kFloat32)
    unfused = "float32 has no fused kernel";
  else if (geometry == kNone)
    unfused = "no fused kernel was compiled for this generator's geometry";
  else if (device.major != 9 && device.major != 10)
    unfused = "the fused kernel is compiled for compute capability 9.0 and 10.0";
  else if (device.shared_memory < fused_shared_bytes(geometry))
    unfused = "a block may not have enough shared memory for the fused kernel";

  // A fused block takes as long for one group as for all that fit side by side; the layered kernel takes longer from
  // about a quarter of them on (docs/gpu.md: MNIST generator, H200, between 20 groups and 1,250 by interpolation).
  const bool many = groups * 4 > processors;
  if (wanted == Mapping::kFused && !unfused.empty())
    throw std::invalid_argument("mapping \"fused\" was asked for, but " + unfused);
  s.mapping = wanted;
  s.reason = "asked for";
  if (wanted == Mapping::kAuto) {
    s.mapping = many && unfused.empty() ? Mapping::kFused : Mapping::kLayered;
    s.reason = !unfused.empty() ? unfused
               : many           ? "groups of 8 rows for a quarter of the multiprocessors and more"
                                : "groups of 8 rows for a quarter of the multiprocessors at most";
  }
  s.rows_in_flight = s.mapping == Mapping::kFused ? std::max<int64_t>(1, max_rows > 0 ? std::min(rows, max_rows) : rows)
                                                  : rows_per_launch(program, rows, max_rows);
  s.exact_rows_in_flight = rows_per_launch(program.float32(), rows, max_rows);
  s.exact_blocks = processors;
  s.teams = 1;
  s.blocks_per_team = processors;
  if (s.mapping == Mapping::kSplit) {
    s.teams = int(std::max<int64_t>(1, std::min<int64_t>(groups_of(s.rows_in_flight), processors)));
    s.blocks_per_team = std::max(1, processors / s.teams);
  } else if (s.mapping == Mapping::kFused) {
    s.teams = int(groups_of(s.rows_in_flight));
    s.blocks_per_team = 1;
  }
  s.workspace_bytes = lay_out(program, s, true).bytes;
  return s;
}

Schedule schedule_decoding(const Program& program, const Device& device, int64_t rows, int64_t max_rows) {
  Schedule s = schedule_projection(program.float32(), device, rows, max_rows, Mapping::kLayered);
  s.reason = "one forward pass";
  return s;
}

void project(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
             const Schedule& schedule, const ProjectArgs& args) {
  pack_weights(queue, program, tables, parameters, schedule, args.workspace);
  descend(queue, program, tables, schedule, args);
}

void pack_weights(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                  const Schedule& schedule, void* workspace) {
  const Program& exact = program.float32();
  const Workspace w = lay_out(program, schedule, true);
  char* const base = static_cast<char*>(workspace);
  const char* const own_tables = static_cast<const char*>(tables);
  const char* const exact_tables = own_tables + exact_tables_offset(program);
  pack(queue, exact, exact_tables, parameters, schedule, base + w.exact_weights, base + w.exact_vectors);
  if (&exact != &program) pack(queue, program, own_tables, parameters, schedule, base + w.weights, base + w.vectors);
}

void descend(Queue& queue, const Program& program, const void* tables, const Schedule& schedule,
             const ProjectArgs& args) {
  const Program& exact = program.float32();
  const Workspace w = lay_out(program, schedule, true);
  char* const base = static_cast<char*>(args.workspace);
  const char* const own_tables = static_cast<const char*>(tables);
  const char* const exact_tables = own_tables + exact_tables_offset(program);

  TeamParams p{};
  p.tables = own_tables;
  p.weights = base + w.weights;
  p.vectors = reinterpret_cast<const float*>(base + w.vectors);
  p.groups = base + w.groups;
  p.barriers = reinterpret_cast<TeamBarrier*>(base + w.barriers);
  p.purpose = Purpose::kDescend;
  p.call.images = args.images;
  p.call.start = args.start;
  p.call.start_per_image = args.start_per_image;
  p.call.rows = int32_t(args.images_count * args.restarts);
  p.call.restarts = args.restarts;
  p.call.descent = args.descent;
  p.call.velocities = args.velocities;
  p.call.latents = args.latents;
  p.call.velocities_out = args.velocities_out;
  if (schedule.mapping == Mapping::kFused)
    run_fused(queue, program, p.weights, p.vectors, p.call, schedule.rows_in_flight);
  else
    run_teams(queue, program, p, schedule.rows_in_flight, schedule.teams, schedule.blocks_per_team);

  // The error that picks the restart is float32 in every precision.
  p.tables = exact_tables;
  p.weights = base + w.exact_weights;
  p.vectors = reinterpret_cast<const float*>(base + w.exact_vectors);
  p.purpose = Purpose::kErrors;
  p.call.start = args.latents;
  p.call.start_per_image = 1;
  p.call.velocities = nullptr;
  p.errors = args.errors;
  run_teams(queue, exact, p, schedule.exact_rows_in_flight, 1, schedule.exact_blocks);
}

void decode(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
            const Schedule& schedule, const float* latents, int64_t count, void* workspace, float* images,
            const uint32_t* wanted) {
  const Program& exact = program.float32();
  const Workspace w = lay_out(exact, schedule, false);
  char* const base = static_cast<char*>(workspace);
  const char* const exact_tables = static_cast<const char*>(tables) + exact_tables_offset(program);
  pack(queue, exact, exact_tables, parameters, schedule, base + w.exact_weights, base + w.exact_vectors, wanted);
  TeamParams p{};
  p.tables = exact_tables;
  p.weights = base + w.exact_weights;
  p.vectors = reinterpret_cast<const float*>(base + w.exact_vectors);
  p.groups = base + w.groups;
  p.barriers = reinterpret_cast<TeamBarrier*>(base + w.barriers);
  p.purpose = Purpose::kDecode;
  p.call.start = latents;
  p.call.start_per_image = 1;
  p.call.rows = int32_t(count);
  p.call.restarts = 1;
  p.decoded = images;
  p.wanted = wanted;
  run_teams(queue, exact, p, schedule.exact_rows_in_flight, 1, schedule.exact_blocks);
}

}  // namespace defgan::cuda
