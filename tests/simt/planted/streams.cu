// Launches on different streams, whose blocks share the device.
#include <cooperative_groups.h>
#include <flags.h>

#include <algorithm>

#include "../runtime/launch.h"
#include "../runtime/settings.h"
#include "case.h"

namespace planted::streams {

using cbam_fused::release_add;
using cbam_fused::take_ticket;
using cbam_fused::wait_at_least;

// Any two handles that differ.
char handles[2];
cudaStream_t stream(int i) { return reinterpret_cast<cudaStream_t>(&handles[i]); }

// The sum of each row of x by a cluster: by its threads, then by one of each block, then by one of all.
__global__ void sums_kernel(const float* x,    // [rows, columns]
                            float* sums,       // [rows]
                            float* began,      // [rows]: when, among all the rows of every launch
                            int32_t* tickets,  // [1]
                            int columns) {
  DYNAMIC_SHARED(float, values);  // [blockDim]
  SHARED_ARRAY(float, part, 1);
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  const int row = blockIdx.x / blocks, thread = threadIdx.x, threads = blockDim.x;
  const bool first = rank == 0 && thread == 0;
  if (first) store(began + row, float(take_ticket(tickets)));
  float sum = 0;
  for (int i = rank * threads + thread; i < columns; i += blocks * threads) sum += load(x + row * columns + i);
  values[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    sum = 0;
    for (int i = 0; i < threads; ++i) sum += values[i];
    part[0] = sum;
  }
  cluster.sync();
  if (first) {
    sum = 0;
    for (int i = 0; i < blocks; ++i) sum += cluster.map_shared_rank(part, i)[0];
    store(sums + row, sum);
  }
  cluster.sync();
}

// Two launches that differ in everything: clusters, threads, shared memory and rows.
Result interleaved() {
  constexpr int kColumns = 300;
  constexpr unsigned kRows[] = {7, 5}, kBlocks[] = {2, 4}, kThreads[] = {64, 40};
  Buffer<float> x("x", 7 * kColumns, [](size_t i) { return i % 7; });
  Buffer<float> sums[] = {{"sums", kRows[0]}, {"sums", kRows[1]}}, began[] = {{"began", kRows[0]}, {"began", kRows[1]}};
  Buffer<int32_t> tickets("tickets", 1, [](size_t) { return 0; });
  simt::run_together([&] {
    for (int i = 0; i < 2; ++i) {
      const Grid grid = {kRows[i] * kBlocks[i], kThreads[i], kBlocks[i], kThreads[i] * sizeof(float), stream(i)};
      launch(sums_kernel, grid, x.get(), sums[i].get(), began[i].get(), tickets.get(), kColumns);
    }
  });
  expect_equal("launches", simt::launches().size(), size_t(2));
  const auto begin = [&](int i) { return *std::min_element(began[i].get(), began[i].get() + kRows[i]); };
  const auto end = [&](int i) { return *std::max_element(began[i].get(), began[i].get() + kRows[i]); };
  if (end(0) < begin(1) || end(1) < begin(0)) throw std::runtime_error("one launch after the other");
  const auto expected = [](size_t row) {
    double sum = 0;
    for (size_t column = 0; column < kColumns; ++column) sum += (row * kColumns + column) % 7;
    return sum;
  };
  Result all = expect(sums[0], expected), more = expect(sums[1], expected);
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

// Every block but the last waits for the next one.
__global__ void wait_for_next_kernel(int32_t* flags) {  // [blocks], 0 at first
  if (threadIdx.x > 0) return;
  if (blockIdx.x + 1 < gridDim.x) wait_at_least(flags + blockIdx.x + 1, 1);
  release_add(flags + blockIdx.x, 1);
}

// All blocks of the grid have a place on the device while it is alone there, and not when another one is there too.
Result relies_on_being_alone() {
  simt::settings.order = simt::Order::kAscending;
  simt::settings.resident = 2;
  Buffer<int32_t> flags("flags", 6, [](size_t) { return 0; });
  launch(wait_for_next_kernel, {2, 1}, flags.get());
  simt::run_together([&] {
    launch(wait_for_next_kernel, {2, 1, 1, 0, stream(0)}, flags.get() + 2);
    launch(wait_for_next_kernel, {2, 1, 1, 0, stream(1)}, flags.get() + 4);
  });
  return expect(flags, [](size_t) { return 1; });
}

// As if two launches were given the same scratch.
__global__ void copy_through_kernel(const float* x, float* scratch, float* y) {  // [1]
  store(scratch, load(x));
  store(y, load(scratch));
}

Result share_scratch() {
  Buffer<float> x("x", 1, [](size_t) { return 1; });
  Buffer<float> scratch("scratch", 1), y("y", 2);
  simt::run_together([&] {
    for (int i = 0; i < 2; ++i)
      launch(copy_through_kernel, {1, 1, 1, 0, stream(i)}, x.get(), scratch.get(), y.get() + i);
  });
  return expect(y, [](size_t) { return 1; });
}

Result one_stream() {
  Buffer<float> x("x", 1, [](size_t) { return 1; });
  Buffer<float> scratch("scratch", 1), y("y", 1);
  simt::run_together([&] {
    for (int i = 0; i < 2; ++i) launch(copy_through_kernel, {1, 1}, x.get(), scratch.get(), y.get());
  });
  return expect(y, [](size_t) { return 1; });
}

const Case kCases[] = {
    {"interleaved", interleaved},
    {"relies_on_being_alone", relies_on_being_alone},
    {"share_scratch", share_scratch},
    {"one_stream", one_stream},
};

}  // namespace planted::streams
