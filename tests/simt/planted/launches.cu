// Launches: every thread runs once in whatever shape, and configurations that the device refuses.
#include "../runtime/launch.h"
#include "../runtime/settings.h"
#include "case.h"

namespace planted::launches {

constexpr int kColumns = 8;

__global__ void visit_kernel(float* visits) {  // [gridDim, blockDim], each in the order z, y, x
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  store(visits + block * (blockDim.x * blockDim.y * blockDim.z) + thread, float(block));
}

Result visit() {
  constexpr unsigned kThreads = 4 * 3 * 2;
  Buffer<float> visits("visits", 5 * 3 * 2 * kThreads);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(5, 3, 2);
  config.blockDim = dim3(4, 3, 2);
  const cudaError_t status = cudaLaunchKernelEx(&config, visit_kernel, visits.get());
  expect_equal<std::string>("the launch", cudaGetErrorName(status), "cudaSuccess");
  const simt::LaunchRecord& record = simt::launches().back();
  expect_equal("blocks", record.blocks, 30u);
  expect_equal("threads", record.threads, kThreads);
  return expect(visits, [](size_t i) { return i / kThreads; });
}

__global__ void nothing_kernel() {}

void expect_refused(const char* expected, const Grid& grid) {
  const size_t before = simt::launches().size();
  expect_equal<std::string>("the launch", cudaGetErrorName(try_launch(nothing_kernel, grid)), expected);
  expect_equal<std::string>("the last error", cudaGetErrorName(cudaGetLastError()), expected);
  expect_equal<std::string>("the error after that", cudaGetErrorName(cudaGetLastError()), "cudaSuccess");
  expect_equal("launches", simt::launches().size(), before);
}

Result refused() {
  expect_refused("cudaErrorInvalidConfiguration", {0, 32, 1});
  expect_refused("cudaErrorInvalidConfiguration", {1, 0, 1});
  expect_refused("cudaErrorInvalidConfiguration", {1, 1025, 1});
  expect_refused("cudaErrorInvalidConfiguration", {1u << 31, 32, 1});
  expect_refused("cudaErrorInvalidClusterSize", {9, 32, 2});
  expect_refused("cudaErrorInvalidClusterSize", {32, 32, 16});
  return {};
}

__global__ void other_kernel() {}

// More than 48 KB of dynamic shared memory must be asked for, and there is an end.
Result dynamic_shared() {
  constexpr size_t kMore = (48 << 10) + 1, kMost = 227 << 10;
  const auto status = [&](size_t bytes) {
    return std::string(cudaGetErrorName(try_launch(other_kernel, {1, 32, 1, bytes})));
  };
  const auto allow = [](size_t bytes) {
    return std::string(
        cudaGetErrorName(cudaFuncSetAttribute(other_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))));
  };
  expect_equal<std::string>("asking for the usual", allow(48 << 10), "cudaSuccess");
  expect_equal<std::string>("more, not asked for", status(kMore), "cudaErrorInvalidValue");
  expect_equal<std::string>("asking for too much", allow(kMost + 1), "cudaErrorInvalidValue");
  expect_equal<std::string>("asking for more", allow(kMost), "cudaSuccess");
  expect_equal<std::string>("more", status(kMore), "cudaSuccess");
  return {};
}

// Collectives of part of a warp, and of a block that does not fill its last warp.
__global__ void collectives_kernel(float* y) {  // [blockDim.x]
  const int lane = threadIdx.x % warpSize;
  float value = lane;
  if (lane < 8) value += __shfl_xor_sync(0x000000ff, value, 1) + __popc(__ballot_sync(0x000000ff, lane % 2));
  value += __shfl_up_sync(0xffffffff, lane, 1, 4) + __shfl_down_sync(0xffffffff, lane, 1, 4);
  value += __syncthreads_count(lane == 0) + 10 * __syncthreads_or(lane == 3) + 20 * __syncthreads_and(lane != 40);
  value += 100 * __any_sync(0xffffffff, lane == 31) + 200 * __all_sync(0xffffffff, lane < 32);
  store(y + threadIdx.x, value);
}

Result collectives() {
  constexpr size_t kThreads = 40;
  Buffer<float> y("y", kThreads);
  launch(collectives_kernel, {1, kThreads}, y.get());
  return expect(y, [](size_t i) {
    const int lane = i % 32, within = lane % 4;
    const int up = within ? lane - 1 : lane, down = within < 3 ? lane + 1 : lane;
    return lane + (lane < 8 ? (lane ^ 1) + 4 : 0) + up + down + 2 + 10 + 20 + (i < 32 ? 100 : 0) + 200;
  });
}

// Adds up each row of x, from 0 or from what it finds in `sums`: as if nobody had used that memory since it was
// cleared.
template <bool from_zero>
__global__ void add_kernel(const float* x,  // [blocks, kColumns]
                           float* sums) {   // [blocks]
  if (threadIdx.x > 0) return;
  float sum = from_zero ? 0 : load(sums + blockIdx.x);
  for (int i = 0; i < kColumns; ++i) sum += load(x + blockIdx.x * kColumns + i);
  store(sums + blockIdx.x, sum);
}

template <bool from_zero>
Result add(unsigned repeat) {
  constexpr size_t kRows = 4;
  Buffer<float> x("x", kRows * kColumns, [](size_t i) { return i + 1; });
  Buffer<float> sums("sums", kRows, [](size_t) { return 0; });
  simt::settings.repeat = repeat;
  const size_t before = simt::launches().size();
  launch(add_kernel<from_zero>, {kRows, 32}, static_cast<const float*>(x.get()), sums.get());
  expect_equal("launches", simt::launches().size(), before + 1);
  Result result;
  for (size_t i = 0; i < kRows; ++i) result.push_back(sums[i]);
  cbam_fused::forget_announced();
  return result;
}

template <bool from_zero>
Result repeated() {
  const Result once = add<from_zero>(1), twice = add<from_zero>(2);
  if (once != twice) throw std::runtime_error("another result where it is launched twice");
  return once;
}

const Case kCases[] = {
    {"visit", visit},
    {"refused", refused},
    {"dynamic_shared", dynamic_shared},
    {"collectives", collectives},
    {"repeated", repeated<true>},
    {"relies_on_cleared_memory", repeated<false>},
};

}  // namespace planted::launches
