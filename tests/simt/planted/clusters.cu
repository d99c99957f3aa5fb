// A row shared by the blocks of a cluster, and errors in how they read each other's shared memory.
#include <cooperative_groups.h>

#include "case.h"

namespace planted::clusters {

enum class Bug { kNone, kNoBarrier, kEarlyExit };

constexpr int kThreads = 32;

// Each block adds up its part of the row; the first one adds the parts.
template <int blocks, Bug bug>
__global__ void cluster_sums_kernel(const float* x,  // [rows, columns]
                                    float* sums,     // [rows]
                                    int columns) {
  SHARED_ARRAY(float, part, 1);
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = int(cluster.block_rank()), row = blockIdx.x / blocks;
  float sum = 0;
  for (int i = rank * kThreads + int(threadIdx.x); i < columns; i += blocks * kThreads)
    sum += load(x + int64_t(row) * columns + i);
  for (int by = warpSize / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffff, sum, by);
  if (threadIdx.x == 0) part[0] = sum;
  if (bug != Bug::kNoBarrier) cluster.sync();
  if (rank == 0 && threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < blocks; ++i) total += cluster.map_shared_rank(part, i)[0];
    store(sums + row, total);
  }
  if (bug != Bug::kEarlyExit) cluster.sync();
}

template <int blocks, Bug bug>
Result cluster_sums() {
  constexpr int kRows = 5, kColumns = 300;
  Buffer<float> x("x", kRows * kColumns, [](size_t i) { return i % 7; });
  Buffer<float> sums("sums", kRows);
  launch(cluster_sums_kernel<blocks, bug>, {kRows * blocks, kThreads, blocks}, x.get(), sums.get(), kColumns);
  return expect(sums, [](size_t row) {
    double sum = 0;
    for (size_t column = 0; column < kColumns; ++column) sum += (row * kColumns + column) % 7;
    return sum;
  });
}

const Case kCases[] = {
    {"cluster_sums_of_2", cluster_sums<2, Bug::kNone>},
    {"cluster_sums_of_8", cluster_sums<8, Bug::kNone>},
    {"no_cluster_barrier", cluster_sums<4, Bug::kNoBarrier>},
    {"peer_exits_early", cluster_sums<4, Bug::kEarlyExit>},
};

}  // namespace planted::clusters
