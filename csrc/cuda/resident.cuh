// The cluster-resident form of cbam_inference: the blocks of a cluster hold a sample in their shared memory. One
// launch, and x is read once. From sm_90 on.
//
// A block has whole leaves of the rows of the sample's matrix (see order.h). So it can pool its rows by itself, and
// every leaf of each column; what is made of several blocks' rows is read from their shared memory and divided among
// the blocks: the pools of columns, the hidden units, the gates and the maps. The sums are those of the kernels that
// stream x, in the same order.
#pragma once

#include "cbam_apply.cuh"
#include "channel_gate.cuh"
#include "pooling.cuh"

namespace cbam_fused {

constexpr int kResidentThreads = 256;
constexpr int kMostClusterBlocks = 8;

template <class T>
struct Resident {
  using A = Compute<T>;

  Apply<T> apply;              // tensors, convolution, norm, activation
  Descriptors<A> descriptors;  // options and sizes; there are no pools in memory
  EitherMlp<T> mlp;
  int64_t rows, columns;  // of a sample's matrix
  RowOrder order;         // of its rows
  int blocks;             // of a cluster
  int block_leaves;       // of a block, at most
};

// What a block has in shared memory: its part of x, and arrays of compute numbers, here by their size.
struct ResidentRoom {
  int64_t x;              // elements of x
  int64_t inputs;         // [B, C], rows rounded up to vectors
  int64_t branch_hidden;  // [B, R], likewise
  int64_t hidden;         // [R], likewise
  int64_t gate;           // [C]
  int64_t leaves;         // [block_leaves, columns], twice: sums and maxima
  int64_t maps;           // [M, HW]
  int64_t spatial_gate;   // of the block's pixels
  int64_t sums;           // of the convolution

  template <class T>
  __host__ __device__ ResidentRoom(const Resident<T>& p, bool channels_last) {
    const int64_t block_rows = int64_t(p.block_leaves) * kLeafRows, branches = p.descriptors.columns;
    const int64_t pixels = channels_last ? p.rows : p.columns;
    x = block_rows * p.columns;
    inputs = branches * GateRoom::rounded_up(p.descriptors.channels);
    hidden = GateRoom::rounded_up(p.mlp.reduced);
    branch_hidden = branches * hidden;
    gate = p.descriptors.channels;
    leaves = p.block_leaves * p.columns;
    maps = p.apply.convolution.maps.count * pixels;
    spatial_gate = channels_last ? block_rows : pixels;
    sums = p.apply.convolution.sums();
  }
  // Bytes. The part of x is a multiple of 64.
  template <class T>
  int64_t bytes() const {
    const int64_t numbers = inputs + branch_hidden + hidden + gate + 2 * leaves + maps + spatial_gate + sums;
    return x * int64_t(sizeof(T)) + numbers * int64_t(sizeof(Compute<T>));
  }
};

// Divides a sample among as many blocks as a cluster may have. Whether there is a kernel for x in T with these options:
// rows in one part, samples that begin at multiples of 16 bytes.
template <class T>
bool set_resident(Resident<T>& p, const Shape& s) {
  const Pool& pool = p.descriptors.pool;
  if (sizeof(T) > 4 || pool.lp || pool.lse || p.mlp.reduced == 0 || p.apply.gate != SpatialGate::kPools) return false;
  p.rows = s.rows();
  p.columns = s.columns();
  p.order = row_order<T>(p.columns, s.channels_last);
  const int64_t leaves = column_leaves(p.rows);
  p.block_leaves = int(ceil_div(leaves, kMostClusterBlocks));
  p.blocks = int(ceil_div(leaves, p.block_leaves));
  return p.order.parts == 1 && s.sample() % kVector<T> == 0;
}

// Whether the current device can run it: it was compiled for clusters, and there is room for one.
template <class T>
bool resident_fits(const Stream& stream, const Resident<T>& p, const Shape& s);

template <class T>
void resident_launch(const Stream& stream, const Resident<T>& p, const Shape& s);

}  // namespace cbam_fused
