// Products of images with candidates, one kernel an instruction set. Whole numbers: all kernels give the same bits.
#pragma once

#include <cstdint>

namespace defgan::cpu {

// Candidates are packed by groups of as many: [group][pair of pixels][candidate of the group][2].
constexpr int kCandidateGroup = 16;

struct CandidateProducts {
  const int32_t* images;  // two levels of 16 bits a word, [images][pairs]
  int64_t count;          // of images
  const int16_t* group;   // one group of candidates
  int64_t pairs;
  int64_t* products;  // out: [images][kCandidateGroup]
};
using CandidateKernel = void (*)(const CandidateProducts&);

void candidate_products_baseline(const CandidateProducts& p);
#if defined(__x86_64__)
void candidate_products_avx2(const CandidateProducts& p);
void candidate_products_avx512(const CandidateProducts& p);
#endif

// That of the instruction set in use.
CandidateKernel active_candidate_kernel();

}  // namespace defgan::cpu
