// What x is multiplied by before it is pooled: nothing, or a factor of each column or row of a sample's matrix.
#pragma once

#include "memory.h"

namespace cbam_fused {

struct NoFactors {};

// In device memory, of all samples.
template <class A>
struct FactorsInMemory {
  const A* values;  // [N, length]
  int64_t length;

  __device__ A at(int64_t sample, int64_t index) const { return load(values + sample * length + index); }
  // Those of a strip (see load_factors).
  template <bool kAligned, int kCount>
  __device__ void strip(int64_t sample, unsigned at, unsigned apart, unsigned end, A (&factors)[kCount]) const {
    load_factors<kAligned>(values + sample * length, at, apart, end, factors);
  }
};

// In shared memory, of the one sample that a block serves.
template <class A>
struct FactorsInBlock {
  const A* values;  // [length]

  __device__ A at(int64_t, int64_t index) const { return values[index]; }
  template <bool kAligned, int kCount>
  __device__ void strip(int64_t, unsigned at, unsigned apart, unsigned end, A (&factors)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) factors[i] = at + i * apart < end ? values[at + i * apart] : A(0);
  }
};

}  // namespace cbam_fused
