#include "cores.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <vector>

namespace defgan::cpu {
namespace {

constexpr int kUnlimited = std::numeric_limits<int>::max();

int rounded_up(double quota, double period) {
  if (!(quota > 0 && period > 0)) return kUnlimited;
  const double cores = std::min(quota / period, 1e6);
  return std::max(1, int(cores) + (cores > int(cores)));
}

// Version 2: "max 100000" or "150000 100000".
int unified_limit(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max") return kUnlimited;
  return rounded_up(std::strtod(quota.c_str(), nullptr), period);
}

// Version 1: a quota of -1 is none.
int legacy_limit(const std::string& folder) {
  double quota = 0, period = 0;
  std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
  std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  return rounded_up(quota, period);
}

// Whether a list with commas holds the word.
bool lists(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// A hierarchy of control groups where it is mounted, and which of its folders is the mount point.
struct Hierarchy {
  bool unified;
  std::string mount_point, mounted;
};

// /proc/self/mountinfo: "31 30 0:29 /mounted /mount/point options [tags] - type source options".
std::vector<Hierarchy> hierarchies(const std::string& root) {
  std::vector<Hierarchy> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream before(line.substr(0, dash)), after(line.substr(dash + 3));
    std::string skipped, mounted, point, type, options;
    before >> skipped >> skipped >> skipped >> mounted >> point;
    after >> type >> skipped >> options;
    if (type == "cgroup2" || (type == "cgroup" && lists(options, "cpu")))
      found.push_back({type == "cgroup2", point, mounted});
  }
  return found;
}

// /proc/self/cgroup: "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1.
std::string group_of(const std::string& root, bool unified) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (unified ? controllers.empty() : lists(controllers, "cpu")) return line.substr(second + 1);
  }
  return "/";
}

}  // namespace

int cores_of_affinity() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  const unsigned cores = std::thread::hardware_concurrency();  // also on machines of more than 1024
  return cores ? int(cores) : kUnlimited;
}

int cores_of_quota(const std::string& root) {
  int least = kUnlimited;
  for (const Hierarchy& h : hierarchies(root)) {
    // Inside of a container the path may be the host's, of which only the part below the mounted folder is in sight.
    std::string group = group_of(root, h.unified);
    if (h.mounted != "/" && group.compare(0, h.mounted.size(), h.mounted) == 0) group.erase(0, h.mounted.size());
    while (!group.empty() && group.back() == '/') group.pop_back();
    for (;;) {
      const std::string folder = root + h.mount_point + group;
      least = std::min(least, h.unified ? unified_limit(folder) : legacy_limit(folder));
      const size_t cut = group.rfind('/');
      if (cut == std::string::npos) break;
      group.erase(cut);
    }
  }
  return least;
}

}  // namespace defgan::cpu
