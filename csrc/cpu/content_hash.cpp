#include "content_hash.h"

#include <algorithm>
#include <cstring>

#include "team.h"

namespace defgan::cpu {
namespace {

// Eight independent lanes, so that the multiplications overlap; each step is a bijection of its lane for given
// data and of the data for a given lane, so that no single changed word can go unnoticed within a lane.
void absorb(Hash& hash, const void* data, size_t bytes) {
  constexpr uint64_t kPrime = 0x9fb21c651e98df25u;
  uint64_t lanes[8];
  for (int i = 0; i < 8; ++i) lanes[i] = hash.a + uint64_t(i) * hash.b;
  const char* p = static_cast<const char*>(data);
  const auto step = [&](const char* chunk) {
    uint64_t words[8];
    std::memcpy(words, chunk, 64);
    for (int i = 0; i < 8; ++i) {
      const uint64_t x = (lanes[i] ^ words[i]) * kPrime;
      lanes[i] = x ^ (x >> 32);
    }
  };
  size_t left = bytes;
  for (; left >= 64; left -= 64, p += 64) step(p);
  char last[64] = {};
  std::memcpy(last, p, left);
  step(last);
  for (int i = 0; i < 8; ++i) {
    hash.a = (hash.a ^ lanes[i]) * kPrime;
    hash.a ^= hash.a >> 29;
    hash.b = (hash.b + lanes[i]) * 0xd6e8feb86659fd93u;
    hash.b ^= hash.b >> 32;
  }
  hash.a += bytes;
}

}  // namespace

// Works piece by piece: with large parameters hashing is much of what a call costs beside its steps, so threads share it.
Hash hash_of(const std::vector<Parameter>& parameters, int threads) {
  constexpr size_t kPieceBytes = size_t(1) << 18, kWorthThreads = size_t(1) << 20;
  struct Piece {
    const char* data;
    size_t bytes;
  };
  std::vector<Piece> pieces;
  size_t total = 0;
  Hash whole;
  for (const Parameter& p : parameters) {
    absorb(whole, &p.elements, sizeof(p.elements));  // where one ends and the next begins
    const char* data = reinterpret_cast<const char*>(p.data);
    for (size_t left = size_t(p.elements) * sizeof(float); left > 0;) {
      const size_t bytes = std::min(left, kPieceBytes);
      pieces.push_back({data, bytes});
      data += bytes;
      left -= bytes;
      total += bytes;
    }
  }
  std::vector<Hash> hashes(pieces.size());
  // All of torch's threads or none: for fewer some would have to be started.
  const Lease lease(total < kWorthThreads ? 1 : threads);
  const size_t members = lease.threads() == threads ? size_t(lease.threads()) : 1;
  run_threads(int(members), [&](int member) {
    for (size_t i = size_t(member); i < pieces.size(); i += members) absorb(hashes[i], pieces[i].data, pieces[i].bytes);
  });
  absorb(whole, hashes.data(), hashes.size() * sizeof(Hash));
  return whole;
}

}  // namespace defgan::cpu
