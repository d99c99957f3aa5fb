// reduce_rows: the pools of each row of x, or of x * column_factor.
// x [N, rows, columns]; column_factor [N, columns]; out: [N, parts, rows] (see pools.h, and order.h for the order).
// In NCHW it pools pixels; in channels_last channels, and the factors are the channel gates.
// Traffic: x once. The factors are read once for kAccumulators rows.
//
// A group of lanes serves one part of as many rows as it has at once; the rows of a block follow each other. Blocks go
// through the rows of the first part of the first sample, then of its second part, and so on.
#pragma once

#include <algorithm>

#include "launch.h"
#include "order.h"
#include "pools.h"

namespace cbam_fused {

constexpr int kReduceThreads = 256;

template <class T>
struct ReduceRows {
  const T* x;                       // [N, rows, columns]
  const Compute<T>* column_factor;  // [N, columns], or null: none
  PartialPools<Compute<T>> pools;   // [N, parts, rows], out
  int64_t samples, rows, columns;
  RowOrder order;
  bool descending;  // samples from the last to the first
};

template <class T, bool kAligned, Ties ties, bool kAll, bool kFactor>
__global__ void __launch_bounds__(kReduceThreads, 2) reduce_rows_kernel(ReduceRows<T> p) {
  using A = Compute<T>;
  constexpr int kCount = kStrip<T, kAligned>;
  const int lanes = p.order.lanes, rows_at_once = p.order.rows_at_once();
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int block_rows = int(blockDim.x) / lanes * rows_at_once;
  const int64_t row_blocks = ceil_div(p.rows, block_rows), block = blockIdx.x;
  const int64_t part = block / row_blocks % p.order.parts, sample_at = block / row_blocks / p.order.parts;
  const int64_t sample = p.descending ? p.samples - 1 - sample_at : sample_at;
  const int64_t first_row = block % row_blocks * block_rows + group * rows_at_once;
  const int64_t part_columns = int64_t(kChunksPerPart) * lanes * kCount;
  const unsigned begin = unsigned(part * part_columns);
  const unsigned end = unsigned(p.columns < begin + part_columns ? p.columns : begin + part_columns);

  // Accumulator k has strips of row k / at_once: one of each chunk, or of every at_once-th.
  const int at_once_shift = kFactor ? 0 : p.order.at_once_shift;
  const unsigned chunk = lanes * kCount, apart = kAligned ? 1 : lanes, step = chunk << at_once_shift;
  const T* rows[kAccumulators];
  unsigned ends[kAccumulators], ahead[kAccumulators];
  Pools<A> pools[kAccumulators];
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t row = first_row + (k >> at_once_shift);
    rows[k] = p.x + (sample * p.rows + row) * p.columns;
    ends[k] = row < p.rows ? end : 0;
    ahead[k] = (k & ((1 << at_once_shift) - 1)) * chunk;
    pools[k] = no_pools<ties, A>();
  }

#pragma unroll 1
  for (unsigned column = begin + (kAligned ? lane * kCount : lane); column < end; column += step) {
    Strip<T, kCount> strips[kAccumulators];
#pragma unroll
    for (int k = 0; k < kAccumulators; ++k)
      strips[k] = load_strip<kAligned, kCount>(rows[k], column + ahead[k], apart, ends[k]);
    A factor[kCount];
    if constexpr (kFactor) load_factors<kAligned>(p.column_factor + sample * p.columns, column, apart, end, factor);
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
  if (lane < rows_at_once && row < p.rows) p.pools.template store_part<ties, kAll>(sample, part, row, own);
}

template <Ties ties, bool kAll, bool kFactor, class T>
void reduce_rows_launch(const Stream& stream, const ReduceRows<T>& p) {
  const auto kernel = p.columns % kVector<T> == 0 ? reduce_rows_kernel<T, true, ties, kAll, kFactor>
                                                  : reduce_rows_kernel<T, false, ties, kAll, kFactor>;
  const int64_t groups = ceil_div(p.rows, p.order.rows_at_once());
  const int threads = int(std::min<int64_t>(ceil_div(groups * p.order.lanes, kWarp) * kWarp, kReduceThreads));
  const int64_t row_blocks = ceil_div(p.rows, threads / p.order.lanes * p.order.rows_at_once());
  launch(stream, "reduce_rows", kernel, {p.samples * p.order.parts * row_blocks, unsigned(threads)}, p);
}

}  // namespace cbam_fused
