// Launches in the CPU execution of kernels: the orders of threads, what wrong use throws, what a failure's message
// says.
#include <stdexcept>

#include "execution.h"

namespace {

void orders() {
  const auto trace = [](uint64_t seed) {
    std::vector<int> order;
    Memory memory;
    outcome(
        memory, {3, 64, 0, false},
        [&] {
          for (int i = 0; i < 2; ++i) {
            order.push_back(block_index() * 64 + thread_index());
            sync_block();
          }
        },
        seed);
    CHECK(order.size() == 2 * 3 * 64, "%zu", order.size());
    return order;
  };
  std::vector<int> straight;
  for (int block = 0; block < 3; ++block)
    for (int round = 0; round < 2; ++round)
      for (int thread = 0; thread < 64; ++thread) straight.push_back(block * 64 + thread);
  // Whoever arrives last goes on first.
  std::vector<int> first = trace(0);
  for (int block = 0; block < 3; ++block)
    std::sort(first.begin() + block * 128 + 64, first.begin() + block * 128 + 128);
  CHECK(first == straight, "without a seed the order is plain");
  CHECK(trace(1) == trace(1), "one seed, one order");
  CHECK(trace(1) != trace(2) && trace(1) != straight, "other seeds, other orders");
  CHECK(trace(1)[0] / 64 != trace(2)[0] / 64 || trace(1)[0] / 64 != trace(3)[0] / 64 ||
            trace(1)[0] / 64 != trace(4)[0] / 64,
        "blocks change places");
}

template <class Error>
void throws(const char* part, const std::function<void()>& call) {
  try {
    call();
    CHECK(false, "nothing thrown, expected '%s'", part);
  } catch (const Error& error) {
    CHECK(std::string(error.what()).find(part) != std::string::npos, "'%s' lacks '%s'", error.what(), part);
  }
}

void wrong_use() {
  Memory memory;
  float data[64] = {};
  memory.add("data", data, 128, true);
  throws<std::invalid_argument>("overlaps", [&] { memory.add("more", data + 31, 8, true); });
  throws<std::invalid_argument>("overlaps", [&] { memory.add("same", data, 8, true); });
  throws<std::invalid_argument>("overlaps", [&] { memory.add("inside", data + 1, 8, true); });
  throws<std::invalid_argument>("within one range", [&] { memory.mark_initialised(data + 30, 16); });
  throws<std::invalid_argument>("no range", [&] { memory.remove(data + 1); });
  memory.add("empty", data, 0, true);
  memory.add("empty, nowhere", nullptr, 0, true);
  memory.add("after", data + 32, 128, true);
  memory.remove(data);
  memory.add("again", data, 128, true);
  const auto nothing = [] {};
  throws<std::invalid_argument>("multiple of 32", [&] { execution::launch(memory, 1, 33, 0, false, nothing); });
  throws<std::invalid_argument>("blocks", [&] { execution::launch(memory, 0, 32, 0, false, nothing); });
  throws<std::invalid_argument>("resident", [&] { execution::launch(memory, 17, 1024, 0, true, nothing); });
  throws<std::logic_error>("cannot launch", [&] {
    execution::launch(memory, 1, 32, 0, false, [&] { execution::launch(memory, 1, 32, 0, false, nothing); });
  });
  throws<std::domain_error>("from a kernel", [&] {
    execution::launch(memory, 2, 32, 0, true, [&] {
      if (block_index() == 1 && thread_index() == 5) throw std::domain_error("from a kernel");
      sync_block();
    });
  });
  // Whatever went wrong before, the next launch runs.
  int ran = 0;
  execution::launch(memory, 2, 64, 0, true, [&] { ++ran; });
  CHECK(ran == 128, "%d threads ran", ran);
}

// A message names the thread, the byte, both lines and how far both had come.
void messages() {
  Memory memory;
  float data[8] = {};
  memory.add("weights", data, sizeof(data), true);
  const int line = __LINE__;
  const auto kernel = [&] {
    sync_block();
    if (thread_index() == 3) store_global(data + 2, 1.0f);   // line + 3
    if (thread_index() == 70) store_global(data + 2, 1.0f);  // line + 4
  };
  const std::string message = outcome(memory, {1, 96, 0, false}, kernel, 0);
  const std::string file = "test_execution_launch.cpp:";
  for (const std::string& part :
       {std::string("race: "), std::string("thread 3 of block 0"), std::string("thread 70 of block 0"),
        std::string("byte 8 of 'weights'"), file + std::to_string(line + 3), file + std::to_string(line + 4),
        std::string("after 1 sync_block, 0 sync_warp")})
    CHECK(message.find(part) != std::string::npos, "'%s' lacks '%s'", message.c_str(), part.c_str());
  CHECK(message.find('\n') == std::string::npos, "one line");
}

}  // namespace

int main() {
  orders();
  wrong_use();
  messages();
  return report_execution("execution, launch");
}
