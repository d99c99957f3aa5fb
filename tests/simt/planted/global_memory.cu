// Global memory: what is counted, and errors that counting loads and stores show.
#include <cuda_pipeline.h>

#include "../runtime/global_memory.h"
#include "case.h"

namespace planted::global_memory {

constexpr int kThreads = 64;

void expect_traffic(const char* name, uint64_t loaded, uint64_t loaded_sectors, uint64_t stored,
                    uint64_t stored_sectors) {
  const simt::Traffic& t = simt::traffic().at(name);
  expect_equal(std::string(name) + ": bytes loaded", t.loaded, loaded);
  expect_equal(std::string(name) + ": sectors loaded", t.loaded_sectors, loaded_sectors);
  expect_equal(std::string(name) + ": bytes stored", t.stored, stored);
  expect_equal(std::string(name) + ": sectors stored", t.stored_sectors, stored_sectors);
}

// y = x, by threads whose elements lie `stride` apart. Part of the lanes do nothing the first time.
__global__ void strided_copy_kernel(const float* x,  // [elements]
                                    float* y,        // [elements]
                                    int elements, int stride) {
  for (int i = 0; i < stride; ++i) {
    const int at = (blockIdx.x * kThreads + threadIdx.x) * stride + i;
    if (at < elements) store(y + at, load(x + at));
  }
}

// Sectors of 32 bytes hold 8 floats: neighbours share them, and lanes that lie 8 floats apart do not.
template <int stride>
Result strided_copy() {
  constexpr int kElements = 4 * kThreads;
  struct alignas(32) Sector {
    float values[8];
  };
  const std::unique_ptr<Sector[]> x(new Sector[kElements / 8]), y(new Sector[kElements / 8]);
  for (int i = 0; i < kElements; ++i) x[i / 8].values[i % 8] = i;
  cbam_fused::announce(x.get(), kElements * sizeof(float), "x", false);
  cbam_fused::announce(y.get(), kElements * sizeof(float), "y", true);
  launch(strided_copy_kernel, {kElements / stride / kThreads, kThreads}, static_cast<const float*>(x[0].values),
         y[0].values, kElements, stride);
  const uint64_t bytes = kElements * sizeof(float), sectors = bytes / 32 * stride;
  expect_traffic("x", bytes, sectors, 0, 0);
  expect_traffic("y", 0, 0, bytes, sectors);
  return Result(y[0].values, y[0].values + kElements);
}

enum class Bug { kUnannounced, kUncounted, kTooWide, kIndexOverflow, kUninitialised };

struct alignas(32) Eight {
  float values[8];
};

template <Bug bug>
__global__ void broken_copy_kernel(const float* x,  // [kThreads]
                                   float* y) {      // [kThreads]
  const int i = threadIdx.x;
  if (bug == Bug::kIndexOverflow) {
    const unsigned element = (threadIdx.x + 1) * 0x10000000u;
    if (element == 5) return;
  }
  if (bug == Bug::kTooWide && i == 0) load(reinterpret_cast<const Eight*>(x));
  store(y + i, bug == Bug::kUncounted ? x[i] : bug == Bug::kUninitialised ? load(y + i) : load(x + i));
}

template <Bug bug>
Result broken_copy() {
  Buffer<float> x("x", kThreads, [](size_t i) { return i; });
  Buffer<float> y("y", kThreads);
  const std::unique_ptr<float[]> unknown(new float[kThreads]());
  launch(broken_copy_kernel<bug>, {1, kThreads}, bug == Bug::kUnannounced ? unknown.get() : x.get(), y.get());
  return expect(y, [](size_t i) { return i; });
}

// Every thread of every block stores to one place.
__global__ void store_one_kernel(float* y) { store(y, 1.0f); }

Result race_of_blocks() {
  Buffer<float> y("y", 1);
  launch(store_one_kernel, {8, 1}, y.get());
  return expect(y, [](size_t) { return 1; });
}

// y = x through shared memory, in two groups of asynchronous copies of which `awaited` are waited for.
template <int awaited>
__global__ void async_copy_kernel(const float* x,  // [2, kThreads]
                                  float* y) {      // [2, kThreads]
  SHARED_ARRAY(float, values, 2 * kThreads);
  for (int i = threadIdx.x; i < 2 * kThreads; i += kThreads) {
    __pipeline_memcpy_async(values + i, x + i, sizeof(float));
    __pipeline_commit();
  }
  __pipeline_wait_prior(2 - awaited);
  for (int i = threadIdx.x; i < 2 * kThreads; i += kThreads) store(y + i, values[i]);
  __pipeline_wait_prior(0);
}

template <int awaited>
Result async_copy() {
  Buffer<float> x("x", 2 * kThreads, [](size_t i) { return i; });
  Buffer<float> y("y", 2 * kThreads);
  launch(async_copy_kernel<awaited>, {1, kThreads}, x.get(), y.get());
  return expect(y, [](size_t i) { return i; });
}

const Case kCases[] = {
    {"coalesced_copy", strided_copy<1>},
    {"strided_copy", strided_copy<4>},
    {"unannounced", broken_copy<Bug::kUnannounced>},
    {"uncounted", broken_copy<Bug::kUncounted>},
    {"too_wide", broken_copy<Bug::kTooWide>},
    {"index_overflow", broken_copy<Bug::kIndexOverflow>},
    {"uninitialised", broken_copy<Bug::kUninitialised>},
    {"race_of_blocks", race_of_blocks},
    {"async_copy", async_copy<2>},
    {"async_copy_not_awaited", async_copy<1>},
};

}  // namespace planted::global_memory
