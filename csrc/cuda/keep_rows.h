// The end of a leg of a descent from which only some rows go on: a block takes an image, ranks its rows by their errors,
// copies what they ended with to the call's results, and those that go on to where the next leg begins.
//
// A rank is the number of rows that come before, a place the number of rows before it that go on; both in global memory,
// which the block's threads share.
#pragma once

#include "../legs.h"
#include "layout.h"

namespace defgan::cuda {

DEFGAN_DEVICE void keep_kernel(const KeepParams& p) {
  for (int image = block_index(); image < p.images; image += block_count()) {
    const int first = image * p.rows;
    for (int i = thread_index(); i < p.rows; i += block_threads()) {
      const float error = load_constant(p.errors + first + i);
      int rank = 0;
      for (int j = 0; j < p.rows; ++j) rank += ranks_before(load_constant(p.errors + first + j), j, error, i) ? 1 : 0;
      store_global(p.ranks + first + i, int32_t(rank));
    }
    sync_block();
    for (int i = thread_index(); i < p.rows; i += block_threads()) {
      const int restart = p.restart == nullptr ? i : load_constant(p.restart + first + i);
      store_global(p.all_errors + image * p.restarts + restart, load_constant(p.errors + first + i));
      store_global(p.all_steps + image * p.restarts + restart, int64_t(p.steps));
      int place = kNone;
      if (load_global(p.ranks + first + i) < p.kept) {
        place = 0;
        for (int j = 0; j < i; ++j) place += load_global(p.ranks + first + j) < p.kept ? 1 : 0;
        store_global(p.next_restart + image * p.kept + place, int32_t(restart));
      }
      store_global(p.places + first + i, int32_t(place));
    }
    sync_block();
    const int k = p.latent_size;
    for (int64_t e = thread_index(); e < int64_t(p.rows) * k; e += block_threads()) {
      const int i = int(e / k), channel = int(e % k);
      const int64_t from = (first + i) * int64_t(k) + channel;
      const int restart = p.restart == nullptr ? i : load_constant(p.restart + first + i);
      const float z = load_constant(p.latents + from);
      store_global(p.all_latents + (int64_t(image) * p.restarts + restart) * k + channel, z);
      const int place = load_global(p.places + first + i);
      if (place == kNone) continue;
      const int64_t to = (int64_t(image) * p.kept + place) * k + channel;
      store_global(p.next_latents + to, z);
      store_global(p.next_velocities + to, load_constant(p.velocities + from));
    }
  }
}

}  // namespace defgan::cuda
