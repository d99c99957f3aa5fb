// Sums over rows, and errors in how the warps of a block put their parts together.
#include <cuda_bf16.h>

#include "case.h"

namespace planted::row_sums {

enum class Bug {
  kNone,
  kNoBarrier,
  kNoTrailingBarrier,
  kSharedOutOfBounds,
  kDivergentBarrier,
  kDivergentWarp,
  kExitedLane,
  kGlobalOutOfBounds,
  kGlobalMisaligned,
};

constexpr int kThreads = 64, kWarps = kThreads / warpSize;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ inline float warp_sum(float value) {
  for (int by = warpSize / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by);
  return value;
}

template <Bug bug>
__device__ float block_sum(float value, float* parts) {
  const int warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize;
  if (bug == Bug::kDivergentWarp && lane < 8) value = warp_sum(value);
  if (bug == Bug::kExitedLane && lane == 8) return value;
  value = warp_sum(value);
  if (lane == 0) parts[bug == Bug::kSharedOutOfBounds ? warp + 1 : warp] = value;
  if (bug != Bug::kNoBarrier) __syncthreads();
  if (bug == Bug::kDivergentBarrier && warp == 0) __syncthreads();
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += parts[i];
  if (bug != Bug::kNoTrailingBarrier) __syncthreads();
  return sum;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// The sum of each row of x, and of its squares.
template <class T, Bug bug>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const T* x,   // [rows, columns]
                                                            float* sums,  // [rows, 2]
                                                            int columns) {
  SHARED_ARRAY(float, parts, kWarps);
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    const float value = to_float(load(x + int64_t(blockIdx.x) * columns + i));
    sum += value;
    squares += value * value;
  }
  sum = block_sum<bug>(sum, parts);
  squares = block_sum<bug>(squares, parts);
  if (threadIdx.x > 0) return;
  float* out = sums + 2 * (blockIdx.x + (bug == Bug::kGlobalOutOfBounds ? 1 : 0));
  if (bug == Bug::kGlobalMisaligned) out = reinterpret_cast<float*>(reinterpret_cast<char*>(out) + 2);
  store(out, sum);
  store(out + 1, squares);
}

template <class T, Bug bug>
Result row_sums() {
  constexpr int kRows = 8, kColumns = 200;
  const auto value = [](size_t i) { return double(i % 5) - 1; };
  Buffer<T> x("x", kRows * kColumns, value);
  Buffer<float> sums("sums", kRows * 2);
  launch(row_sums_kernel<T, bug>, {kRows, kThreads}, x.get(), sums.get(), kColumns);
  const auto expected = [&](size_t i) {
    double sum = 0;
    for (size_t column = 0; column < kColumns; ++column) {
      const double v = value(i / 2 * kColumns + column);
      sum += i % 2 ? v * v : v;
    }
    return sum;
  };
  return expect(sums, expected);
}

const Case kCases[] = {
    {"row_sums_float", row_sums<float, Bug::kNone>},
    {"row_sums_bfloat16", row_sums<__nv_bfloat16, Bug::kNone>},
    {"no_barrier", row_sums<float, Bug::kNoBarrier>},
    {"no_trailing_barrier", row_sums<float, Bug::kNoTrailingBarrier>},
    {"shared_out_of_bounds", row_sums<float, Bug::kSharedOutOfBounds>},
    {"divergent_barrier", row_sums<float, Bug::kDivergentBarrier>},
    {"divergent_warp", row_sums<float, Bug::kDivergentWarp>},
    {"exited_lane", row_sums<float, Bug::kExitedLane>},
    {"global_out_of_bounds", row_sums<float, Bug::kGlobalOutOfBounds>},
    {"global_misaligned", row_sums<float, Bug::kGlobalMisaligned>},
};

}  // namespace planted::row_sums
