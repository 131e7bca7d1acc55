#include "nearest_search.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "../candidate_pixels.h"
#include "nearest_params.h"

namespace defgan::cuda {
namespace {

// Decoded float32 images at a time, and scores.
constexpr int64_t kPieceBytes = int64_t(64) << 20, kScoreBytes = int64_t(64) << 20;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int blocks_for(int64_t items, int64_t of_a_block, int most) {
  return int(std::clamp<int64_t>((items + of_a_block - 1) / of_a_block, 1, most));
}

// What is kept between calls and the workspace of one, each as offsets; and how the call is cut.
struct Layout {
  int64_t quads, piece_rows, round_images, words;
  Schedule decoding;
  size_t copy, levels, squared_norms, largest, kept_bytes;
  size_t differs, stale, image_words, factors, scores, decoded, decoding_workspace, workspace_bytes;
};

Layout lay_out(const Program& program, const std::vector<Parameter>& parameters, const Device& device, int64_t count,
               int64_t images_count) {
  const int64_t pixels = program.header.pixels;
  Layout l{};
  l.quads = round_up(pixels, kQuadPixels) / kQuadPixels;
  l.piece_rows = std::min(round_up(std::max<int64_t>(1, kPieceBytes / (pixels * 4)), kLanes), round_up(count, kLanes));
  l.round_images = std::clamp<int64_t>(kScoreBytes / (count * 8), 1, std::max<int64_t>(images_count, 1));
  l.words = count * program.plan.latent_size();
  for (const Parameter& p : parameters) l.words += p.elements;
  if (std::max({l.words, count * l.quads, images_count}) > std::numeric_limits<int32_t>::max() / 2)
    throw std::invalid_argument("parameters, candidates and images must have fewer than 2^30 elements each on CUDA");
  l.decoding = schedule_decoding(program, device, std::min(l.piece_rows, count), 0);

  size_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const size_t here = at;
    at += size_t(round_up(bytes, 256));
    return here;
  };
  l.copy = take(l.words * 4);
  l.levels = take(round_up(count, kLanes) * l.quads * kQuadPixels * 2);
  l.squared_norms = take(count * 8);
  l.largest = take(kLargestBlocks * 4);
  l.kept_bytes = at;
  at = 0;
  l.differs = take(int64_t(device.multiprocessors) * 4);
  l.stale = take(4);
  l.image_words = take(l.round_images * l.quads * kQuadPixels * 2);
  l.factors = take(l.round_images * 8);
  l.scores = take(l.round_images * count * 8);
  l.decoded = take(std::min(l.piece_rows, count) * pixels * 4);
  l.decoding_workspace = take(int64_t(l.decoding.workspace_bytes));
  l.workspace_bytes = at;
  return l;
}

class Search {
 public:
  Search(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
         const Device& device, const SearchArgs& args)
      : queue_(queue),
        program_(program),
        tables_(tables),
        parameters_(parameters),
        args_(args),
        processors_(std::max(device.multiprocessors, 1)),
        layout_(lay_out(program, parameters, device, args.count, args.images_count)) {
    char* const kept = static_cast<char*>(args.kept);
    char* const working = static_cast<char*>(args.workspace);
    for (const Parameter& p : parameters) add_content(p);
    add_content({args.candidates, args.count * program.plan.latent_size()});
    content_.blocks = processors_;
    content_.copy = reinterpret_cast<uint32_t*>(kept + layout_.copy);
    content_.valid = args.valid;
    content_.differs = reinterpret_cast<uint32_t*>(working + layout_.differs);
    content_.stale = reinterpret_cast<uint32_t*>(working + layout_.stale);

    call_.stale = content_.stale;
    call_.count = int32_t(args.count);
    call_.pixels = program.header.pixels;
    call_.quads = int32_t(layout_.quads);
    call_.is_bounded = nearest::bounded(program.plan);
    call_.is_sigmoid = nearest::is_sigmoid(program.plan);
    call_.decoded = reinterpret_cast<float*>(working + layout_.decoded);
    call_.largest = reinterpret_cast<float*>(kept + layout_.largest);
    call_.levels = kept + layout_.levels;
    call_.squared_norms = reinterpret_cast<int64_t*>(kept + layout_.squared_norms);
    call_.restarts = int32_t(args.restarts);
    call_.words = working + layout_.image_words;
    call_.factors = reinterpret_cast<int64_t*>(working + layout_.factors);
    call_.scores = reinterpret_cast<int64_t*>(working + layout_.scores);
  }

  void run() {
    launch(KernelId::kCompareContent, &content_, processors_, kNearestThreads * 4);
    launch(KernelId::kDecideStale, &content_, 1, 0);
    if (!call_.is_bounded) for_pieces(KernelId::kLargestPixel, kLargestBlocks);
    for_pieces(KernelId::kPackCandidates, processors_ * 4);
    launch(KernelId::kCopyContent, &content_, processors_, 0);
    for (int64_t first = 0; first < args_.images_count; first += layout_.round_images) round(first);
  }

 private:
  void add_content(const Parameter& p) {
    content_.data[content_.count] = p.data;
    content_.words[content_.count++] = int32_t(p.elements);
  }

  void launch(KernelId kernel, const void* params, int blocks, int shared_bytes) {
    queue_.launch({kernel, Precision::kFloat32, 0, params, blocks, kNearestThreads, size_t(shared_bytes), false});
  }

  // Decodes the candidates piece by piece, where they are stale, and runs the kernel on each.
  void for_pieces(KernelId kernel, int blocks) {
    const int64_t k = program_.plan.latent_size();
    for (int64_t first = 0; first < args_.count; first += layout_.piece_rows) {
      const int64_t rows = std::min(layout_.piece_rows, args_.count - first);
      decode(queue_, program_, tables_, parameters_, layout_.decoding, args_.candidates + first * k, rows,
             static_cast<char*>(args_.workspace) + layout_.decoding_workspace, const_cast<float*>(call_.decoded),
             call_.stale);
      NearestParams p = call_;
      p.piece_first = int32_t(first);
      p.piece_rows = int32_t(rows);
      launch(kernel, &p, blocks, kNearestThreads * 8);
    }
  }

  void round(int64_t first) {
    NearestParams p = call_;
    p.image_count = int32_t(std::min(layout_.round_images, args_.images_count - first));
    p.images = args_.images + first * p.pixels;
    p.draws = args_.draws ? args_.draws + first : nullptr;
    p.indices = args_.indices + first * args_.restarts;
    launch(KernelId::kPackImages, &p, blocks_for(p.image_count, 1, processors_ * 4), kNearestWarps * 4);
    const int64_t groups = round_up(p.count, kLanes * kNearestWarps) / (kLanes * kNearestWarps);
    const int64_t tiles = round_up(p.image_count, kScoreImages) / kScoreImages;
    launch(KernelId::kScore, &p, int(groups * tiles), kScoreSharedBytes);
    launch(KernelId::kSelect, &p, blocks_for(p.image_count, 1, processors_ * 8), kSelectSharedBytes);
  }

  Queue& queue_;
  const Program& program_;
  const void* tables_;
  const std::vector<Parameter>& parameters_;
  const SearchArgs& args_;
  const int processors_;
  const Layout layout_;
  ContentParams content_{};
  NearestParams call_{};
};

}  // namespace

SearchSizes search_sizes(const Program& program, const std::vector<Parameter>& parameters, const Device& device,
                         int64_t count, int64_t images_count) {
  const Layout l = lay_out(program, parameters, device, count, images_count);
  return {l.kept_bytes, l.workspace_bytes};
}

void find_nearest(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                  const Device& device, const SearchArgs& args) {
  if (args.images_count == 0) return;
  Search(queue, program, tables, parameters, device, args).run();
}

}  // namespace defgan::cuda
