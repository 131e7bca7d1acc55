// How many threads can run at the same time here.
#pragma once

#include <string>

namespace defgan::cpu {

// Cores that the calling thread may run on, by its affinity.
int cores_of_affinity();

// Cores' worth of time that control groups (version 1 or 2, of this process and all above it) allow, rounded up; a large
// number where they set no limit. `root` stands before /proc and /sys: a test has its own.
int cores_of_quota(const std::string& root = "");

}  // namespace defgan::cpu
