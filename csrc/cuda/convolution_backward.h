// The backward of the spatial gate's convolution and norm, for a range of pixels of one sample, by one block.
//
// Tap (ky, kx) of the convolution led from pixel p to the logit of pixel q = p - (ky - k/2) W - (kx - k/2). So what a
// tap needs of the logits' gradient dz are `count` values that follow each other, and one stretch of dz per row of taps
// serves both the gradients of the pixels' maps (times the weights, summed over taps) and those of the weights (times
// the maps, summed over pixels).
#pragma once

#include "gate.h"
#include "tile.h"

namespace cbam_fused {

// Backward of the norm: dz from the gradient of the norm's result.
template <class A>
struct NormBackward {
  const A* norm_grad;  // [N, HW], or null without a spatial gate
  const A* logits;     // [N, HW]
  NormParameters<A> norm;
  const A* norm_sums;  // [2], or null: the norm's statistics are constants
  A count;             // how many values the statistics are of
};

template <class A>
class LogitsGrad {
 public:
  __device__ LogitsGrad(const NormBackward<A>& backward, int64_t first)
      : norm_grad_(backward.norm_grad + first), logits_(backward.logits + first) {
    if (!backward.norm.mean) return;
    const A inverse_deviation = backward.norm.inverse_deviation();
    scale_ = backward.norm.weight ? backward.norm.weight[0] * inverse_deviation : inverse_deviation;
    through_statistics_ = backward.norm_sums != nullptr;
    if (!through_statistics_) return;
    inverse_deviation_ = inverse_deviation;
    mean_ = backward.norm.mean[0];
    grad_mean_ = load(backward.norm_sums) / backward.count;
    product_mean_ = load(backward.norm_sums + 1) / backward.count;
  }

  // dz of pixel i after the first.
  __device__ A operator()(int64_t i) const {
    A grad = load(norm_grad_ + i);
    if (through_statistics_)
      grad = grad - grad_mean_ - (load(logits_ + i) - mean_) * inverse_deviation_ * product_mean_;
    return grad * scale_;
  }

 private:
  const A *norm_grad_, *logits_;
  A scale_ = 1, inverse_deviation_ = 0, mean_ = 0, grad_mean_ = 0, product_mean_ = 0;
  bool through_statistics_ = false;
};

template <class A>
struct ConvolutionBackward {
  int height, width, kernel_size;
  Parameter<A> weight;  // [M, k, k]
  const A* pooled;      // [N, 2, HW]
  Maps maps;
  NormBackward<A> norm;
  A* weight_grad_parts;  // [M * k * k + 1, parts], out: dz's products with the maps, and its sum
  int64_t parts;
  int block_pixels;  // of a block, at most

  __host__ __device__ int64_t pixels() const { return int64_t(height) * width; }
  __host__ __device__ int area() const { return kernel_size * kernel_size; }

  // Shared memory holds for a row of taps the stretch of dz that belongs to the block's pixels, and the weights; and it
  // holds the pixels' gradients of both maps.
  __host__ __device__ int stretch() const { return block_pixels + kernel_size - 1; }
  __host__ __device__ int row_room() const { return stretch() + int(maps.count) * kernel_size; }
  // Rows of taps that are held at once.
  __host__ __device__ int rows_at_once() const {
    const int most = kMostRoom / row_room();
    return most < 1 ? 1 : most < kernel_size ? most : kernel_size;
  }
  // Numbers in shared memory.
  __host__ __device__ int room() const { return 2 * block_pixels + rows_at_once() * row_room(); }

  static constexpr int kMostRoom = 3072;
};

// Taps of a row whose gradients a lane adds up at the same time.
constexpr int kTapsAtOnce = 4;

// Adds to the weight gradients of one row of taps: a warp, each lane of which has every 32nd pixel.
template <class A>
__device__ inline void add_weight_grads(const ConvolutionBackward<A>& p, const A* dz, const A* maps, int first_pixel,
                                        int count, int ky, int64_t part) {
  const int lane = int(threadIdx.x) % kWarp, k = p.kernel_size, half = k / 2;
  for (int first_tap = 0; first_tap < k; first_tap += kTapsAtOnce) {
    A sums[2][kTapsAtOnce] = {};
    for (int i = lane; i < count; i += kWarp) {
      const int column = (first_pixel + i) % p.width;
      A first_map = load(maps + first_pixel + i), second_map = load(maps + p.pixels() + first_pixel + i);
      if (p.maps.count == 1) first_map = A(0.5) * first_map + A(0.5) * second_map;
#pragma unroll
      for (int t = 0; t < kTapsAtOnce; ++t) {
        const int kx = first_tap + t, source = column - (kx - half);
        if (kx >= k || source < 0 || source >= p.width) continue;
        const A value = dz[i + k - 1 - kx];
        sums[0][t] = std::fma(value, first_map, sums[0][t]);
        sums[1][t] = std::fma(value, second_map, sums[1][t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTapsAtOnce; ++t) {
      if (first_tap + t >= k) break;
      A* target = p.weight_grad_parts + (ky * k + first_tap + t) * p.parts + part;
      const A first_sum = group_sum(sums[0][t], kWarp);
      if (lane == 0) store(target, first_sum);
      if (p.maps.count == 1) continue;
      const A second_sum = group_sum(sums[1][t], kWarp);
      if (lane == 0) store(target + p.area() * p.parts, second_sum);
    }
  }
}

// Calls use(i, gradient of the first map, of the second) for the `count` pixels of sample n from first_pixel on, by one
// thread for each. With `part` not negative also that part of the gradients of weight and bias. All threads of the
// block call, with room() numbers of shared memory.
template <class A, class Use>
__device__ inline void convolution_backward(const ConvolutionBackward<A>& p, int64_t n, int first_pixel, int count,
                                            int64_t part, A* room, Use use) {
  const int thread = int(threadIdx.x), k = p.kernel_size, half = k / 2, maps = int(p.maps.count);
  const int rows_at_once = p.rows_at_once(), stretch = p.stretch();
  const LogitsGrad<A> logits_grad(p.norm, n * p.pixels());
  A* const first_grad = room;
  A* const second_grad = first_grad + p.block_pixels;
  A* const weights = second_grad + p.block_pixels;         // [rows_at_once, M, k]
  A* const stretches = weights + rows_at_once * maps * k;  // [rows_at_once, stretch]
  for (int i = thread; i < count; i += kTileThreads) first_grad[i] = second_grad[i] = 0;

  for (int first_row = 0; first_row < k; first_row += rows_at_once) {
    const int rows = k - first_row < rows_at_once ? k - first_row : rows_at_once;
    __syncthreads();
    for (int j = thread; j < rows * stretch; j += kTileThreads) {
      const int64_t down = int64_t(first_row + j / stretch - half) * p.width;
      const int64_t source = first_pixel - down - half + j % stretch;
      stretches[j] = source >= 0 && source < p.pixels() ? logits_grad(source) : A(0);
    }
    for (int j = thread; j < rows * maps * k; j += kTileThreads) {
      const int row = first_row + j / (maps * k), map = j / k % maps;
      weights[j] = p.weight[map * p.area() + row * k + j % k];
    }
    __syncthreads();
    for (int i = thread; i < count; i += kTileThreads) {
      const int column = (first_pixel + i) % p.width;
      A first = first_grad[i], second = second_grad[i];
      for (int row = 0; row < rows; ++row) {
        const A* weight = weights + row * maps * k;
        const A* dz = stretches + row * stretch + i + k - 1;
        for (int kx = 0; kx < k; ++kx) {
          const int source = column - (kx - half);
          if (source < 0 || source >= p.width) continue;
          first = std::fma(dz[-kx], weight[kx], first);
          if (maps == 2) second = std::fma(dz[-kx], weight[k + kx], second);
        }
      }
      first_grad[i] = first;
      second_grad[i] = second;
    }
    if (part < 0) continue;
    for (int row = thread / kWarp; row < rows; row += kTileWarps)
      add_weight_grads(p, stretches + row * stretch, p.pooled + 2 * n * p.pixels(), first_pixel, count, first_row + row,
                       part);
  }
  if (part >= 0 && thread / kWarp == kTileWarps - 1) {
    A sum = 0;
    for (int i = thread % kWarp; i < count; i += kWarp) sum += logits_grad(first_pixel + i);
    sum = group_sum(sum, kWarp);
    if (thread % kWarp == 0) store(p.weight_grad_parts + maps * p.area() * p.parts + part, sum);
  }
  for (int i = thread; i < count; i += kTileThreads) {
    const A half_grad = A(0.5) * first_grad[i];  // of the one map that is half of each
    use(i, maps == 1 ? half_grad : first_grad[i], maps == 1 ? half_grad : second_grad[i]);
  }
}

}  // namespace cbam_fused
