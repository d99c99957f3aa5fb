// The convolution of the spatial gate, k x k over the pooled maps, for a few pixels of one sample at a time.
//
// A logit is the sum over the kernel's rows, in ascending order, of the sums along each row; these are what the threads
// of a block divide among them. The maps come from the pools over channels and are finished on the way; a block keeps
// what its pixels need of them in shared memory if it has room, else it finishes each map value where it needs it.
#pragma once

#include "parameter.h"
#include "pools.h"
#include "tile.h"

namespace cbam_fused {

template <class A, Ties ties>
struct Convolution {
  PartialPools<A> pools;  // of x * Mc over channels, [N, parts, HW]
  Parameter<A> weight;    // [M, k, k]
  Parameter<A> bias;      // [1] or absent
  Maps maps;
  int64_t channels;
  int height, width, kernel_size;

  int block_pixels;  // of a block, at most

  static constexpr int kMostKept = 16 * 1024 / sizeof(A);
  static constexpr int kMostSums = 1024;

  // Map values that a block needs, and whether it keeps them.
  __host__ __device__ int64_t needed() const {
    const int64_t rows = (int64_t(block_pixels) + width - 2) / width + kernel_size;
    return (rows < height ? rows : height) * width * maps.count;
  }
  __host__ __device__ bool keeps() const { return needed() <= kMostKept; }
  // Sums along kernel rows that are in shared memory at once.
  __host__ __device__ int sums() const { return kernel_size < kMostSums ? kMostSums : kernel_size; }
  // Bytes of shared memory.
  size_t room() const { return (sums() + (keeps() ? needed() : 0)) * sizeof(A); }

  // The maps at a pixel; the convolution has one of them, or half of each.
  struct PixelPools {
    A maximum, mean;
    int32_t tie;
  };
  __device__ PixelPools pixel(int64_t sample, int pixel) const {
    return finished(pools.template total<ties, false>(sample, pixel));
  }
  __device__ PixelPools finished(const Pools<A>& all) const {
    return {all.best.value, all.sum / A(channels), all.best.tie == kNoIndex ? 0 : all.best.tie};
  }
  __device__ A input(const PixelPools& at, int map) const {
    if (maps.count == 1) return A(0.5) * at.maximum + A(0.5) * at.mean;
    return map == maps.max ? at.maximum : at.mean;
  }

  // Calls use(i, logit) for pixels first + i, i = 0, ..., pixels - 1, by one thread for each. All `threads` threads of
  // the block call, with their room() of shared memory.
  template <class Use>
  __device__ void run(int64_t sample, int first, int pixels, int threads, A* room, Use use) const {
    const int half = kernel_size / 2;
    const int first_row = first / width - half, last_row = (first + pixels - 1) / width + half;
    const int begin = (first_row > 0 ? first_row : 0) * width;
    const int end = (last_row < height ? last_row + 1 : height) * width;
    if (keeps()) {
      A* const values = room + sums();
      const int count = end - begin;
      for (int i = int(threadIdx.x); i < count; i += threads) {
        const PixelPools at = pixel(sample, begin + i);
        for (int map = 0; map < maps.count; ++map) values[map * count + i] = input(at, map);
      }
      __syncthreads();
      convolve<4>(first, pixels, threads, room, use, [&](int map, int at) { return values[map * count + at - begin]; });
    } else {
      convolve<1>(first, pixels, threads, room, use, [&](int map, int at) { return input(pixel(sample, at), map); });
    }
  }

  // The same, of maps that value(map, pixel) gives, with `room` for sums() numbers.
  template <int kUnroll, class Use, class Value>
  __device__ void convolve(int first, int pixels, int threads, A* room, Use use, Value value) const {
    const int most = sums() / kernel_size;
    const A shift = bias ? bias[0] : A(0);
    for (int begin = 0; begin < pixels; begin += most) {
      const int count = pixels - begin < most ? pixels - begin : most;
      if (begin > 0) __syncthreads();
      for (int at = int(threadIdx.x); at < count * kernel_size; at += threads)
        room[at] = row_sum<kUnroll>(first + begin + at % count, at / count, value);
      __syncthreads();
      for (int i = int(threadIdx.x); i < count; i += threads) {
        A logit = 0;
        for (int ky = 0; ky < kernel_size; ++ky) logit += room[ky * count + i];
        use(begin + i, bias ? logit + shift : logit);
      }
    }
  }

 private:
  // The sum along row ky of the kernel, centred at a pixel.
  template <int kUnroll, class Value>
  __device__ A row_sum(int pixel, int ky, Value value) const {
    const int half = kernel_size / 2, column = pixel % width, row = pixel / width + ky - half;
    A sum = 0;
    if (row < 0 || row >= height) return sum;
    const int first = column < half ? half - column : 0;
    const int last = width - column + half < kernel_size ? width - column + half : kernel_size;
    for (int map = 0; map < maps.count; ++map) {
      const int64_t taps = (int64_t(map) * kernel_size + ky) * kernel_size;
#pragma unroll kUnroll
      for (int kx = first; kx < last; ++kx)
        sum = std::fma(value(map, row * width + column - half + kx), weight[taps + kx], sum);
    }
    return sum;
  }
};

}  // namespace cbam_fused
