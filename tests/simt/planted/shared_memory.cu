// Shared memory passed between lanes of a warp, accessed wider than it is declared, and of a size that a launch gives.
#include "case.h"

namespace planted::shared_memory {

constexpr int kThreads = 32;

enum class Between { kSync, kShuffle, kPartialSync };

// Each lane passes its value to the next one; only __syncwarp orders that, and only for the lanes of its mask.
template <Between between>
__global__ void rotate_kernel(float* y) {  // [kThreads]
  SHARED_ARRAY(float, values, kThreads);
  const int lane = threadIdx.x;
  values[lane] = lane;
  if (between == Between::kSync) __syncwarp();
  if (between == Between::kShuffle) __shfl_sync(0xffffffff, 0, 0);
  if (between == Between::kPartialSync) lane < 16 ? __syncwarp(0x0000ffff) : __syncwarp(0xffff0000);
  store(y + lane, values[(lane + 1) % kThreads]);
}

template <Between between>
Result rotate() {
  Buffer<float> y("y", kThreads);
  launch(rotate_kernel<between>, {1, kThreads}, y.get());
  return expect(y, [](size_t i) { return (i + 1) % kThreads; });
}

struct alignas(16) Four {
  float values[4];
};

// An array of floats is aligned for floats, and not for whole vectors.
__global__ void wide_kernel(float* y) {  // [4]
  SHARED_ARRAY(float, values, 4);
  if (threadIdx.x == 0) *reinterpret_cast<Four*>(values) = {{0, 1, 2, 3}};
  __syncthreads();
  if (threadIdx.x < 4) store(y + threadIdx.x, values[threadIdx.x]);
}

Result wide() {
  Buffer<float> y("y", 4);
  launch(wide_kernel, {1, kThreads}, y.get());
  return expect(y, [](size_t i) { return i; });
}

// Reverses through dynamic shared memory.
__global__ void reverse_kernel(float* y) {  // [blockDim.x]
  DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  store(y + threadIdx.x, values[blockDim.x - 1 - threadIdx.x]);
}

template <int elements>
Result reverse() {
  Buffer<float> y("y", kThreads);
  launch(reverse_kernel, {1, kThreads, 1, elements * sizeof(float)}, y.get());
  return expect(y, [](size_t i) { return kThreads - 1 - i; });
}

__global__ void large_kernel(float* y) {  // [1]
  SHARED_ARRAY(float, values, 16384);
  values[threadIdx.x] = 0;
  store(y, values[threadIdx.x]);
}

Result too_large() {
  Buffer<float> y("y", 1);
  launch(large_kernel, {1, 1}, y.get());
  return expect(y, [](size_t) { return 0; });
}

const Case kCases[] = {
    {"rotate", rotate<Between::kSync>},
    {"rotate_by_shuffle", rotate<Between::kShuffle>},
    {"rotate_by_half_warps", rotate<Between::kPartialSync>},
    {"shared_misaligned", wide},
    {"reverse", reverse<kThreads>},
    {"dynamic_out_of_bounds", reverse<kThreads - 1>},
    {"static_shared_too_large", too_large},
};

}  // namespace planted::shared_memory
