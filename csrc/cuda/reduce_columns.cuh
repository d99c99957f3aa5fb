// reduce_columns: the pools of each column of x, or of x * factors of its rows.
// x [N, rows, columns]; factors [N, rows]; out: [N, parts, columns] (see pools.h, and order.h for the order).
// In NCHW it pools channels, and the factors are the channel gates; in channels_last pixels.
// Traffic: x once.
//
// A thread has one leaf of one strip of columns. A block has `lanes` threads side by side and `leaves` leaves, which
// are whole parts, or all there are; its threads meet in shared memory, and each adds up the leaves of some columns.
#pragma once

#include <algorithm>

#include "factors.h"
#include "launch.h"
#include "order.h"
#include "pools.h"

namespace cbam_fused {

constexpr int kColumnThreads = 256;

template <class T>
struct ReduceColumns {
  const T* x;                      // [N, rows, columns]
  PartialPools<Compute<T>> pools;  // [N, parts, columns], out
  int64_t rows, columns;
  int lanes, leaves;  // of a block
  Samples samples;

  ReduceColumns() = default;
  ReduceColumns(const T* x, const PartialPools<Compute<T>>& pools, int64_t rows, int64_t columns,
                const Samples& samples)
      : x(x), pools(pools), rows(rows), columns(columns), samples(samples) {
    // As many leaves as leave room for a warp's reading of neighbouring columns; where there are fewer, more columns.
    leaves = power_of_two_from(column_leaves(rows), kColumnThreads / lanes_for(strips()));
    lanes = power_of_two_from(strips(), kColumnThreads / leaves);
  }

  bool aligned() const { return columns % kVector<T> == 0; }
  int64_t strips() const { return ceil_div(columns, aligned() ? kColumns<T, true> : kColumns<T, false>); }
  int threads() const { return std::max(lanes * leaves, kWarp); }
  // Blocks that serve one sample.
  int64_t blocks() const { return ceil_div(strips(), lanes) * ceil_div(column_leaves(rows), leaves); }
};

// The pools of a block's threads, in shared memory. Element i of each thread's strip has an area of its own, of which
// the gap behind it keeps the accesses by column out of each other's banks.
template <class A, int kCount, Ties ties, bool kAll>
struct SharedPools {
  static constexpr int kArea = kColumnThreads + kWarp / kCount;
  static constexpr int kSize = kCount * kArea;
  A* sum;           // [kSize]
  A* maximum;       // [kSize]
  int32_t* tie;     // [kSize] with ties
  A* squares;       // [kSize] with kAll
  A* exponentials;  // [kSize] with kAll

  __device__ void put(int i, int thread, const Pools<A>& pools) const {
    const int at = i * kArea + thread;
    sum[at] = pools.sum;
    maximum[at] = pools.best.value;
    if constexpr (ties != Ties::kNone) tie[at] = pools.best.tie;
    if constexpr (kAll) {
      squares[at] = pools.squares;
      exponentials[at] = pools.exponentials;
    }
  }
  __device__ Pools<A> get(int i, int thread) const {
    const int at = i * kArea + thread;
    Pools<A> pools = {sum[at], {maximum[at], 0}, A(0), A(0)};
    if constexpr (ties != Ties::kNone) pools.best.tie = tie[at];
    if constexpr (kAll) {
      pools.squares = squares[at];
      pools.exponentials = exponentials[at];
    }
    return pools;
  }
};

// The pools of one leaf of a strip of columns (see load_strip). `matrix` begins with the leaf, the sample's row
// first_row, and has row_count rows from there on, perhaps none.
template <bool kAligned, Ties ties, bool kAll, Space space, class T, class Factors>
__device__ inline void reduce_leaf(const T* matrix, int64_t row_count, int64_t columns, unsigned column, unsigned apart,
                                   int64_t sample, int64_t first_row, const Factors& factors,
                                   Pools<Compute<T>> (&pools)[kColumns<T, kAligned>]) {
  using A = Compute<T>;
  constexpr bool kFactor = !std::is_same_v<Factors, NoFactors>;
  constexpr int kCount = kColumns<T, kAligned>, kRowsAtOnce = kRowsOfStep<T, kAligned>;
  const int rows = int(row_count < kLeafRows ? row_count : kLeafRows);
  A sums[kCount] = {};  // those of `pools` are of a step
#pragma unroll
  for (int i = 0; i < kCount; ++i) pools[i] = no_pools<ties, A>();
#pragma unroll 1
  for (int first = 0; first < rows; first += kRowsAtOnce) {
    Strip<T, kCount> strips[kRowsAtOnce];
    A factor[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const bool exists = first + k < rows;
      strips[k] = load_strip<kAligned, kCount, space>(matrix + (first + k) * columns, column, apart,
                                                      exists ? unsigned(columns) : 0);
      if constexpr (kFactor) factor[k] = exists ? factors.at(sample, first_row + first + k) : A(0);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (first + k >= rows) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        A value = to_compute(strips[k].values[i]);
        if constexpr (kFactor) value *= factor[k];
        add_value<ties, kAll>(pools[i], value, int32_t(first_row + first + k));
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] += pools[i].sum;
      pools[i].sum = A(0);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) pools[i].sum = sums[i];
}

// What block `block` of reduce_columns does.
template <bool kAligned, Ties ties, bool kAll, class T, class Factors>
__device__ inline void reduce_columns(const ReduceColumns<T>& p, const Factors& factors, int64_t block) {
  using A = Compute<T>;
  constexpr int kCount = kColumns<T, kAligned>;
  using Shared = SharedPools<A, kCount, ties, kAll>;
  SHARED_ARRAY(A, sum, Shared::kSize);
  SHARED_ARRAY(A, maximum, Shared::kSize);
  SHARED_ARRAY(int32_t, tie, ties != Ties::kNone ? Shared::kSize : 1);
  SHARED_ARRAY(A, squares, kAll ? Shared::kSize : 1);
  SHARED_ARRAY(A, exponentials, kAll ? Shared::kSize : 1);
  const Shared shared = {sum, maximum, tie, squares, exponentials};

  const int thread = int(threadIdx.x), lane = thread % p.lanes, leaf = thread / p.lanes;
  const int width = p.lanes * kCount;
  const int64_t column_blocks = ceil_div(p.columns, width);
  const int64_t leaf_blocks = ceil_div(p.rows, int64_t(p.leaves) * kLeafRows);
  const int64_t leaf_block = block / column_blocks % leaf_blocks;
  const int64_t sample = p.samples[block / column_blocks / leaf_blocks];
  const int64_t first_leaf = leaf_block * p.leaves, first_column = block % column_blocks * width;

  {
    const unsigned column = unsigned(first_column) + (kAligned ? lane * kCount : lane);
    const int64_t first_row = (first_leaf + leaf) * kLeafRows;
    Pools<A> pools[kCount];
    reduce_leaf<kAligned, ties, kAll, Space::kDevice>(p.x + (sample * p.rows + first_row) * p.columns,
                                                      p.rows - first_row, p.columns, column, kAligned ? 1 : p.lanes,
                                                      sample, first_row, factors, pools);
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared.put(i, thread, pools[i]);
  }
  __syncthreads();

  const int block_parts = p.leaves <= kLeavesPerPart ? 1 : p.leaves / kLeavesPerPart;
  for (int output = thread; output < block_parts * width; output += int(blockDim.x)) {
    const int part = output / width, within = output % width;
    const int i = kAligned ? within % kCount : within / p.lanes;
    const int its_lane = kAligned ? within / kCount : within % p.lanes;
    const int begin = part * kLeavesPerPart;
    const int end = p.leaves < begin + kLeavesPerPart ? p.leaves : begin + kLeavesPerPart;
    Pools<A> pools = shared.get(i, begin * p.lanes + its_lane);
    for (int l = begin + 1; l < end; ++l) pools = merged<ties, kAll>(pools, shared.get(i, l * p.lanes + its_lane));
    const int64_t all_part = first_leaf / kLeavesPerPart + part;
    if (all_part < p.pools.parts && first_column + within < p.columns)
      p.pools.template store_part<ties, kAll>(sample, all_part, first_column + within, pools);
  }
}

template <class T, bool kAligned, Ties ties, bool kAll, class Factors>
__global__ void __launch_bounds__(kColumnThreads, 2) reduce_columns_kernel(ReduceColumns<T> p, Factors factors) {
  reduce_columns<kAligned, ties, kAll>(p, factors, blockIdx.x);
}

template <Ties ties, bool kAll, class T, class Factors>
void reduce_columns_launch(const Stream& stream, const ReduceColumns<T>& p, const Factors& factors) {
  const auto kernel = p.aligned() ? reduce_columns_kernel<T, true, ties, kAll, Factors>
                                  : reduce_columns_kernel<T, false, ties, kAll, Factors>;
  launch(stream, "reduce_columns", kernel, {p.samples.count * p.blocks(), unsigned(p.threads())}, p, factors);
}

}  // namespace cbam_fused
