// The order in which a sample's matrix is summed along its rows and along its columns.
//
// It follows from the matrix's shape and the type of its elements alone, never from the number of samples or the grid,
// so that any assignment of work to blocks that keeps it gives the same bits. Terms make up parts; the kernels leave
// the sums of parts to the one that comes next (see pools.h), which adds them up in ascending order.
//
//   Along rows: `lanes` neighbouring lanes share a row. A chunk is one strip for each of them; a part, kChunksPerPart
//   chunks. A lane deals its strips in turn to up to kAccumulators accumulators, which are then added in pairs, as are
//   the lanes.
//   Along columns: a leaf is kLeafRows rows, added up step by step, a step row by row; a part is kLeavesPerPart leaves.
#pragma once

#include <algorithm>

#include "tile.h"

namespace cbam_fused {

inline int power_of_two_from(int64_t count, int most) {
  int power = 1;
  while (power < count && power < most) power *= 2;
  return power;
}

// ---- Along rows -----------------------------------------------------------------------------------------------------

constexpr int kChunksPerPart = 32;
constexpr int kAccumulators = 4;

struct RowOrder {
  int lanes;
  int at_once_shift;  // 1 << at_once_shift accumulators of a lane serve one row, its others the next rows
  int64_t parts;      // of a row

  __host__ __device__ int rows_at_once() const { return kAccumulators >> at_once_shift; }
};

// Elements of a strip.
template <class T, bool kAligned>
constexpr int kStrip = kAligned || kVector<T> < 4 ? kVector<T> : 4;

// shared_factors: what is summed is multiplied by factors that rows share, so a lane reads them once for several rows.
template <class T>
RowOrder row_order(int64_t columns, bool shared_factors) {
  const bool aligned = columns % kVector<T> == 0;
  const int64_t strips = ceil_div(columns, aligned ? kStrip<T, true> : kStrip<T, false>);
  RowOrder order;
  // Each halving of the lanes at the end costs as much as a few strips, so a lane has several where neighbouring lanes
  // still read neighbouring sectors of the memory; of single elements that takes all of them. A group has at least one
  // lane for each row it may have at once.
  order.lanes = std::max(lanes_for(aligned ? ceil_div(strips, kAccumulators) : strips), kAccumulators);
  const int64_t chunks = ceil_div(strips, order.lanes);
  order.at_once_shift = shared_factors || chunks == 1 ? 0 : chunks == 2 ? 1 : 2;
  order.parts = ceil_div(chunks, kChunksPerPart);
  return order;
}

// ---- Along columns --------------------------------------------------------------------------------------------------

constexpr int kLeafRows = 32;
constexpr int kLeavesPerPart = 8;

inline int64_t column_leaves(int64_t rows) { return ceil_div(rows, kLeafRows); }
inline int64_t column_parts(int64_t rows) { return ceil_div(rows, kLeafRows * kLeavesPerPart); }

// Columns of a thread, and rows of a step, all loaded before the first is added.
template <class T, bool kAligned>
constexpr int kColumns = kAligned ? kVector<T> : 2;
template <class T, bool kAligned>
constexpr int kRowsOfStep = kAligned ? (sizeof(T) == 2 ? 4 : 8) : (sizeof(T) == 8 ? 8 : 16);

}  // namespace cbam_fused
