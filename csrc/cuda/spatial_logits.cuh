// The logits of the spatial gate: z = conv(pooled) [N, H, W], and their statistics over the batch.
// Pools over channels [N, parts, HW] -> pooled [N, 2, H, W], channel ties [N, H, W], z, norm_mean and norm_var [1].
// Nothing of x's size is read.
//
// spatial_logits: a block per kLogitsPixels pixels of one sample; it leaves their mean and squared deviations.
// batch_statistics: one block combines those of all blocks, and moves the running statistics.
#pragma once

#include "convolution.h"
#include "launch.h"
#include "tile.h"

namespace cbam_fused {

constexpr int kLogitsPixels = 256;

template <class A, Ties ties>
struct SpatialLogits {
  Convolution<A, ties> convolution;
  A* pooled;              // [N, 2, HW], out
  int32_t* channel_ties;  // [N, HW], out
  A* logits;              // [N, HW], out
  A* deviations;          // [N, tiles, 2]: mean, sum of squared deviations of a tile, out; or null
};

template <class A, Ties ties>
__global__ void __launch_bounds__(kTileThreads, 2) spatial_logits_kernel(SpatialLogits<A, ties> p) {
  DYNAMIC_SHARED(A, room);
  SHARED_ARRAY(A, logits, kLogitsPixels);
  SHARED_ARRAY(A, warp_sums, kTileWarps);
  SHARED_ARRAY(A, mean, 1);
  const Convolution<A, ties>& convolution = p.convolution;
  const int thread = int(threadIdx.x);
  const int64_t plane = int64_t(convolution.height) * convolution.width;
  const int64_t tiles = ceil_div(plane, kLogitsPixels), sample = blockIdx.x / tiles;
  const int first = int(blockIdx.x % tiles * kLogitsPixels);
  const int pixels = int(plane - first < kLogitsPixels ? plane - first : kLogitsPixels);

  if (thread < pixels) {
    const auto at = convolution.pixel(sample, first + thread);
    const int64_t target = sample * 2 * plane + first + thread;
    store(p.pooled + target + convolution.maps.max * plane, at.maximum);
    store(p.pooled + target + convolution.maps.mean * plane, at.mean);
    store(p.channel_ties + sample * plane + first + thread, at.tie);
  }
  convolution.run(sample, first, pixels, kTileThreads, room, [&](int i, A logit) {
    store(p.logits + sample * plane + first + i, logit);
    logits[i] = logit;
  });
  if (!p.deviations) return;
  __syncthreads();

  // Thread 0 has the sums of the block.
  const A sum = block_sum(thread < pixels ? logits[thread] : A(0), warp_sums);
  if (thread == 0) mean[0] = sum / A(pixels);
  __syncthreads();
  const A deviation = thread < pixels ? logits[thread] - mean[0] : A(0);
  const A squares = block_sum(deviation * deviation, warp_sums);
  if (thread == 0) {
    store(p.deviations + blockIdx.x * int64_t(2), mean[0]);
    store(p.deviations + blockIdx.x * int64_t(2) + 1, squares);
  }
}

// ---- Batch statistics -----------------------------------------------------------------------------------------------

template <class A>
struct BatchStatistics {
  const A* deviations;  // [N, tiles, 2]
  A* norm_mean;         // [1], out
  A* norm_var;          // [1], out: the biased variance; 0 for an empty batch, as the mean
  RunningStatistic running_mean, running_var;
  double momentum;
  int64_t samples, pixels;
};

constexpr int kStatisticsThreads = 256;

template <class A>
__global__ void __launch_bounds__(kStatisticsThreads) batch_statistics_kernel(BatchStatistics<A> p) {
  SHARED_ARRAY(double, sums, kStatisticsThreads);
  const int thread = int(threadIdx.x);
  const int64_t tiles = ceil_div(p.pixels, kLogitsPixels), parts = p.samples * tiles;
  const double count = double(p.samples) * double(p.pixels);

  // The sum of term(mean, squares, values) over the parts, in every thread.
  const auto sum_over_parts = [&](auto term) {
    double sum = 0;
    for (int64_t part = thread; part < parts; part += kStatisticsThreads) {
      const int64_t first = part % tiles * kLogitsPixels;
      const double values = double(p.pixels - first < kLogitsPixels ? p.pixels - first : kLogitsPixels);
      sum += term(double(load(p.deviations + part * 2)), double(load(p.deviations + part * 2 + 1)), values);
    }
    __syncthreads();
    sums[thread] = sum;
    for (int half = kStatisticsThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    __syncthreads();
    return sums[0];
  };
  const double total = sum_over_parts([](double mean, double, double values) { return mean * values; });
  const double mean = count > 0 ? total / count : 0;
  const double squares = sum_over_parts([mean](double part_mean, double squares, double values) {
    return squares + (part_mean - mean) * (part_mean - mean) * values;
  });
  if (thread > 0) return;
  store(p.norm_mean, A(mean));
  store(p.norm_var, A(count > 0 ? squares / count : 0));
  if (count == 0) return;
  p.running_mean.move_towards(mean, p.momentum);
  p.running_var.move_towards(squares / (count - 1), p.momentum);
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

inline int64_t logits_tiles(int64_t pixels) { return ceil_div(pixels, kLogitsPixels); }

template <class A, Ties ties>
void spatial_logits_launch(const Stream& stream, SpatialLogits<A, ties> p, int64_t samples) {
  const int64_t plane = int64_t(p.convolution.height) * p.convolution.width;
  p.convolution.block_pixels = int(plane < kLogitsPixels ? plane : kLogitsPixels);
  launch(stream, "spatial_logits", spatial_logits_kernel<A, ties>,
         {samples * logits_tiles(plane), kTileThreads, p.convolution.room()}, p);
}

template <class A>
void batch_statistics_launch(const Stream& stream, const BatchStatistics<A>& p) {
  launch(stream, "batch_statistics", batch_statistics_kernel<A>, {1, kStatisticsThreads}, p);
}

}  // namespace cbam_fused
