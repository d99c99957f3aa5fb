// What is pooled along the rows or the columns of a sample's matrix: the sum, the maximum and its ties, and, where lp
// or lse pooling is asked for (kAll), the sums of squares and of exponentials.
#pragma once

#include <cmath>

#include "tile.h"

namespace cbam_fused {

template <class A>
struct Pools {
  A sum;
  Maximum<A> best;
  A squares;
  A exponentials;  // of the values less best.value
};

template <Ties ties, class A>
__device__ inline Pools<A> no_pools() {
  return {A(0), no_maximum<A, ties>(), A(0), A(0)};
}

// What exponentials of values less `from` are multiplied by to become those of values less `to`, which is no smaller.
template <class A>
__device__ inline A rescaling(A from, A to) {
  return from == -A(INFINITY) ? A(0) : std::exp(from - to);
}

// Adds `value` at `index`, which is larger than all indices before.
template <Ties ties, bool kAll, class A>
__device__ inline void add_value(Pools<A>& pools, A value, int32_t index) {
  pools.sum += value;
  if constexpr (kAll) {
    pools.squares += value * value;
    const bool larger = exceeds(value, pools.best.value);
    const A low = larger ? pools.best.value : value, high = larger ? value : pools.best.value;
    const A factor = rescaling(low, high);
    pools.exponentials = larger ? pools.exponentials * factor + A(1) : pools.exponentials + factor;
  }
  pools.best = with_later<ties>(pools.best, value, index);
}

// The pools of a and b, whose places are disjoint.
template <Ties ties, bool kAll, class A>
__device__ inline Pools<A> merged(const Pools<A>& a, const Pools<A>& b) {
  Pools<A> both = {a.sum + b.sum, larger<ties>(a.best, b.best), A(0), A(0)};
  if constexpr (kAll) {
    both.squares = a.squares + b.squares;
    both.exponentials = a.exponentials * rescaling(a.best.value, both.best.value) +
                        b.exponentials * rescaling(b.best.value, both.best.value);
  }
  return both;
}

// The pools of a group of lanes, in each of its lanes. All lanes of the warp call.
template <Ties ties, bool kAll, class A>
__device__ inline Pools<A> group_pools(const Pools<A>& own, int lanes) {
  Pools<A> all = {group_sum(own.sum, lanes), group_maximum<ties>(own.best, lanes), A(0), A(0)};
  if constexpr (kAll) {
    all.squares = group_sum(own.squares, lanes);
    all.exponentials = group_sum(own.exponentials * rescaling(own.best.value, all.best.value), lanes);
  }
  return all;
}

// The pools of all parts, which get(part) gives. Sums are made of chains of at most kChain parts, so that none is long.
template <Ties ties, bool kAll, class A, class Get>
__device__ inline Pools<A> total_of_parts(int64_t parts, Get get) {
  constexpr int kChain = 32;
  Pools<A> all = no_pools<ties, A>();
#pragma unroll 1
  for (int64_t first = 0; first < parts; first += kChain) {
    Pools<A> chain = no_pools<ties, A>();
    const int64_t end = first + kChain < parts ? first + kChain : parts;
    for (int64_t part = first; part < end; ++part) chain = merged<ties, kAll>(chain, get(part));
    all = merged<ties, kAll>(all, chain);
  }
  return all;
}

// The pools of all parts of all rows, or columns, of every sample, as a kernel leaves them for the next one.
template <class A>
struct PartialPools {
  A* sum;           // [N, parts, length]
  A* maximum;       // [N, parts, length]
  A* squares;       // [N, parts, length] or null: no lp, no lse
  A* exponentials;  // [N, parts, length] or null, likewise
  int32_t* tie;     // [N, parts, length] or null: no ties
  int64_t parts, length;

  template <Ties ties, bool kAll>
  __device__ void store_part(int64_t sample, int64_t part, int64_t index, const Pools<A>& pools) const {
    const int64_t at = (sample * parts + part) * length + index;
    store(sum + at, pools.sum);
    store(maximum + at, pools.best.value);
    if constexpr (ties != Ties::kNone) store(tie + at, pools.best.tie);
    if constexpr (kAll) {
      store(squares + at, pools.squares);
      store(exponentials + at, pools.exponentials);
    }
  }

  // The pools of all parts.
  template <Ties ties, bool kAll>
  __device__ Pools<A> total(int64_t sample, int64_t index) const {
    return total_of_parts<ties, kAll, A>(parts, [&](int64_t part) {
      const int64_t at = (sample * parts + part) * length + index;
      Pools<A> pools = {load(sum + at), {load(maximum + at), 0}, A(0), A(0)};
      if constexpr (ties != Ties::kNone) pools.best.tie = load(tie + at);
      if constexpr (kAll) {
        pools.squares = load(squares + at);
        pools.exponentials = load(exponentials + at);
      }
      return pools;
    });
  }
};

// PartialPools in scratch memory: how many elements of A it takes, and where they are.
template <class A>
int64_t partial_pools_scratch(int64_t samples, int64_t parts, int64_t length, bool all, bool ties) {
  return samples * parts * length * (2 + 2 * all + ties);
}
template <class A>
PartialPools<A> partial_pools(A* scratch, int64_t samples, int64_t parts, int64_t length, bool all, bool ties) {
  const int64_t count = samples * parts * length;
  A* const more = scratch + 2 * count;
  return {scratch,
          scratch + count,
          all ? more : nullptr,
          all ? more + count : nullptr,
          ties ? reinterpret_cast<int32_t*>(more + 2 * all * count) : nullptr,
          parts,
          length};
}

}  // namespace cbam_fused
