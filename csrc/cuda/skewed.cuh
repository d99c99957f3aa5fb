// The skewed order: launch k pools the pixels of group k of samples, pools the channels of group k - 1, and applies the
// gate to group k - 2, side by side. The end of a launch is the barrier between them, so nothing waits and nothing can
// deadlock; x is read three times, but from device memory once, as three groups fit the L2 cache (see planner.h).
// The blocks are those of reduce_rows, reduce_columns and apply, so the results are too, to the bit.
//
// The channel gate has no launch of its own: the blocks that pool channels first compute that of their sample. Each
// serves several blocks' work, so that the weights they read are few beside x.
#pragma once

#include "cbam_apply.cuh"
#include "channel_gate.cuh"
#include "pooling.cuh"

namespace cbam_fused {

constexpr int kSkewedThreads = 256;
static_assert(kSkewedThreads == kReduceThreads && kSkewedThreads == kColumnThreads && kSkewedThreads == kTileThreads);
// Of dynamic shared memory; with what the kernels declare it is what any block may have.
constexpr size_t kMostSkewedRoom = 20 * 1024;

template <class T, bool kChannelsLast>
struct Skewed {
  using A = Compute<T>;

  Descriptors<A> descriptors;
  EitherMlp<T> mlp;
  A* hidden;        // [N, B, R], out
  A* channel_gate;  // [N, C], out

  std::conditional_t<kChannelsLast, ReduceColumns<T>, ReduceRows<T>> pool_pixels;
  std::conditional_t<kChannelsLast, ReduceRows<T>, ReduceColumns<T>> pool_channels;
  Apply<T> apply;

  // Blocks of each for one sample. A block that pools channels serves channel_tiles of channel_blocks.
  int64_t pixel_blocks, channel_blocks, channel_tiles, apply_blocks;  // set by skewed_launch

  __host__ __device__ int64_t gate_blocks() const { return ceil_div(channel_blocks, channel_tiles); }
  GateRoom gate_room() const { return {int(descriptors.channels), int(mlp.reduced), descriptors.columns}; }
};

// Whether there is a kernel for x in T with these options, of a sample with this many descriptors of a channel.
template <class T>
bool has_skewed_kernel(const Shape& s, const Pool& pool, Ties ties, bool two_layers, bool spatial, int64_t reduced) {
  if (sizeof(T) > 4 || ties == Ties::kEven || pool.lp || pool.lse || !two_layers || !spatial) return false;
  const GateRoom gate = {int(s.c), int(reduced), int(pool.branches())};
  if (s.columns() % kVector<T> != 0 || size_t(gate.size()) * sizeof(Compute<T>) > kMostSkewedRoom) return false;
  return ReduceColumns<T>(nullptr, {}, s.rows(), s.columns(), {}).threads() == kSkewedThreads;
}

// The launches of a whole walk over `samples` samples. Without kApply the gate is not applied.
template <Ties ties, bool kApply, class T, bool kChannelsLast>
void skewed_launch(const Stream& stream, Skewed<T, kChannelsLast> p, int64_t samples, int64_t group_samples);

}  // namespace cbam_fused
