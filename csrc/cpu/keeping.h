// A projection of which only the best rows of each image go on after some steps.
#pragma once

#include <vector>

#include "../legs.h"
#include "projection.h"

namespace defgan::cpu {

// As `project`; steps: out, [B, R], how many steps each row took. A dropped row has the latent and the error with which
// it stopped. args.velocities and velocities_out must be nullptr.
void project_keeping(const PackedGenerator& generator, const ProjectArgs& args, const std::vector<Keep>& keep,
                     int64_t* steps);

}  // namespace defgan::cpu
