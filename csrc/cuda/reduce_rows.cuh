// reduce_rows: the pools of each row of x, or of x * factors of its columns.
// x [N, rows, columns]; factors [N, columns]; out: [N, parts, rows] (see pools.h, and order.h for the order).
// In NCHW it pools pixels; in channels_last channels, and the factors are the channel gates.
// Traffic: x once. The factors are read once for kAccumulators rows.
//
// A group of lanes serves one part of as many rows as it has at once; the rows of a block follow each other. Blocks go
// through the rows of the first part of the first sample, then of its second part, and so on.
#pragma once

#include <algorithm>

#include "factors.h"
#include "launch.h"
#include "order.h"
#include "pools.h"

namespace cbam_fused {

constexpr int kReduceThreads = 256;

template <class T>
struct ReduceRows {
  const T* x;                      // [N, rows, columns]
  PartialPools<Compute<T>> pools;  // [N, parts, rows], out
  int64_t rows, columns;
  RowOrder order;
  Samples samples;

  // Blocks of so many threads that serve one sample.
  __host__ __device__ int64_t blocks(int threads) const {
    return order.parts * ceil_div(rows, threads / order.lanes * order.rows_at_once());
  }
};

// The pools of one part of as many rows of the matrix [row_count, columns] of a sample as a group of lanes has at once,
// from first_row on: calls keep(row, pools), by one lane for each. All lanes of the warp call.
template <bool kAligned, Ties ties, bool kAll, Space space, class T, class Factors, class Keep>
__device__ inline void reduce_row_part(const T* matrix, int64_t row_count, int64_t columns, const RowOrder& order,
                                       int64_t sample, const Factors& factors, int64_t first_row, int64_t part,
                                       Keep keep) {
  using A = Compute<T>;
  constexpr bool kFactor = !std::is_same_v<Factors, NoFactors>;
  constexpr int kCount = kStrip<T, kAligned>;
  const int lanes = order.lanes, lane = int(threadIdx.x) % lanes;
  const int64_t part_columns = int64_t(kChunksPerPart) * lanes * kCount;
  const unsigned begin = unsigned(part * part_columns);
  const unsigned end = unsigned(columns < begin + part_columns ? columns : begin + part_columns);

  // Accumulator k has strips of row k / at_once: one of each chunk, or of every at_once-th.
  const int at_once_shift = kFactor ? 0 : order.at_once_shift;
  const unsigned chunk = lanes * kCount, apart = kAligned ? 1 : lanes, step = chunk << at_once_shift;
  const T* rows[kAccumulators];
  unsigned ends[kAccumulators], ahead[kAccumulators];
  Pools<A> pools[kAccumulators];
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t row = first_row + (k >> at_once_shift);
    rows[k] = matrix + row * columns;
    ends[k] = row < row_count ? end : 0;
    ahead[k] = (k & ((1 << at_once_shift) - 1)) * chunk;
    pools[k] = no_pools<ties, A>();
  }

#pragma unroll 1
  for (unsigned column = begin + (kAligned ? lane * kCount : lane); column < end; column += step) {
    Strip<T, kCount> strips[kAccumulators];
#pragma unroll
    for (int k = 0; k < kAccumulators; ++k)
      strips[k] = load_strip<kAligned, kCount, space>(rows[k], column + ahead[k], apart, ends[k]);
    A factor[kCount];
    if constexpr (kFactor) factors.template strip<kAligned>(sample, column, apart, end, factor);
#pragma unroll
    for (int k = 0; k < kAccumulators; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const unsigned at = column + ahead[k] + i * apart;
        if ((i == 0 || !kAligned) && at >= ends[k]) break;
        A value = to_compute(strips[k].values[i]);
        if constexpr (kFactor) value *= factor[i];
        add_value<ties, kAll>(pools[k], value, int32_t(at));
      }
    }
  }

  if (at_once_shift >= 1) {
    pools[0] = merged<ties, kAll>(pools[0], pools[1]);
    pools[2] = merged<ties, kAll>(pools[2], pools[3]);
  }
  if (at_once_shift == 2) pools[0] = merged<ties, kAll>(pools[0], pools[2]);
  Pools<A> own = no_pools<ties, A>();  // of row `lane` of the group's
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    if (k & ((1 << at_once_shift) - 1)) continue;
    const Pools<A> row_pools = group_pools<ties, kAll>(pools[k], lanes);
    if (lane == k >> at_once_shift) own = row_pools;
  }
  const int64_t row = first_row + lane;
  if (lane < order.rows_at_once() && row < row_count) keep(row, own);
}

// What block `block` of reduce_rows does.
template <bool kAligned, Ties ties, bool kAll, class T, class Factors>
__device__ inline void reduce_rows(const ReduceRows<T>& p, const Factors& factors, int64_t block) {
  const int rows_at_once = p.order.rows_at_once(), group = int(threadIdx.x) / p.order.lanes;
  const int block_rows = int(blockDim.x) / p.order.lanes * rows_at_once;
  const int64_t row_blocks = ceil_div(p.rows, block_rows);
  const int64_t part = block / row_blocks % p.order.parts;
  const int64_t sample = p.samples[block / row_blocks / p.order.parts];
  const int64_t first_row = block % row_blocks * block_rows + group * rows_at_once;
  reduce_row_part<kAligned, ties, kAll, Space::kDevice>(
      p.x + sample * p.rows * p.columns, p.rows, p.columns, p.order, sample, factors, first_row, part,
      [&](int64_t row, const Pools<Compute<T>>& pools) {
        p.pools.template store_part<ties, kAll>(sample, part, row, pools);
      });
}

template <class T, bool kAligned, Ties ties, bool kAll, class Factors>
__global__ void __launch_bounds__(kReduceThreads, 2) reduce_rows_kernel(ReduceRows<T> p, Factors factors) {
  reduce_rows<kAligned, ties, kAll>(p, factors, blockIdx.x);
}

template <Ties ties, bool kAll, class T, class Factors>
void reduce_rows_launch(const Stream& stream, const ReduceRows<T>& p, const Factors& factors) {
  const auto kernel = p.columns % kVector<T> == 0 ? reduce_rows_kernel<T, true, ties, kAll, Factors>
                                                  : reduce_rows_kernel<T, false, ties, kAll, Factors>;
  const int64_t groups = ceil_div(p.rows, p.order.rows_at_once());
  const int threads = int(std::min<int64_t>(ceil_div(groups * p.order.lanes, kWarp) * kWarp, kReduceThreads));
  launch(stream, "reduce_rows", kernel, {p.samples.count * p.blocks(threads), unsigned(threads)}, p, factors);
}

}  // namespace cbam_fused
