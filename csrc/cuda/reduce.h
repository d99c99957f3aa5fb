// Sums, maxima and their ties over the lanes of a group: a power of two of neighbouring lanes of a warp.
//
// NaN is the largest value, as in PyTorch, and the first NaN the first maximum. Beside a maximum is kept its first
// index (Ties::kFirst) or the number of its places (Ties::kEven; none for NaN).
#pragma once

#include <cuda_runtime.h>

#include "../types.h"

namespace cbam_fused {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int32_t kNoIndex = INT32_MAX;

// The smallest power of two of at least `count`, at most a warp: how many lanes serve `count` items.
__host__ __device__ inline int lanes_for(int64_t count) {
  int lanes = 1;
  while (lanes < count && lanes < kWarp) lanes *= 2;
  return lanes;
}

// The sum over a group; the same, to the bit, in each of its lanes. All lanes of the warp call.
template <class A>
__device__ inline A group_sum(A value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <class A>
struct Maximum {
  A value;
  int32_t tie;
};

// What any value replaces.
template <class A, Ties ties>
__device__ inline Maximum<A> no_maximum() {
  return {-A(INFINITY), ties == Ties::kFirst ? kNoIndex : 0};
}

template <class A>
__device__ inline bool exceeds(A value, A other) {
  return !(value <= other) && other == other;
}

// The maximum of both; their places are disjoint, in any order.
template <Ties ties, class A>
__device__ inline Maximum<A> larger(Maximum<A> a, Maximum<A> b) {
  const bool second = exceeds(b.value, a.value);
  if constexpr (ties == Ties::kFirst) {
    return second || (!exceeds(a.value, b.value) && b.tie < a.tie) ? b : a;
  } else if constexpr (ties == Ties::kEven) {
    if (a.value == b.value) return {a.value, a.tie + b.tie};
    return second ? b : a;
  } else {
    return second ? b : a;
  }
}

// The maximum of `best` and of `value` at `index`.
template <Ties ties, class A>
__device__ inline Maximum<A> with_value(Maximum<A> best, A value, int32_t index) {
  const int32_t tie = ties == Ties::kFirst ? index : ties == Ties::kEven ? int32_t(value == value) : 0;
  return larger<ties>(best, Maximum<A>{value, tie});
}

// The maximum of `best` and of `value` at `index`, which is larger than those of all values before.
template <Ties ties, class A>
__device__ inline Maximum<A> with_later(Maximum<A> best, A value, int32_t index) {
  const bool replaces = exceeds(value, best.value);
  if constexpr (ties == Ties::kFirst) {
    return replaces ? Maximum<A>{value, index} : best;
  } else if constexpr (ties == Ties::kEven) {
    if (value == best.value) return {best.value, best.tie + 1};
    return replaces ? Maximum<A>{value, int32_t(value == value)} : best;
  } else {
    return {replaces ? value : best.value, 0};
  }
}

// The maximum over a group, in each of its lanes. All lanes of the warp call.
template <Ties ties, class A>
__device__ inline Maximum<A> group_maximum(Maximum<A> best, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    Maximum<A> other = {__shfl_xor_sync(kAllLanes, best.value, offset), 0};
    if constexpr (ties != Ties::kNone) other.tie = __shfl_xor_sync(kAllLanes, best.tie, offset);
    best = larger<ties>(best, other);
  }
  return best;
}

}  // namespace cbam_fused
