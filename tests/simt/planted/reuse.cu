// How far apart the uses of a sector lie, in kernels where it can be counted by hand.
#include "../runtime/reuse.h"
#include "../runtime/settings.h"
#include "case.h"

namespace planted::reuse {

constexpr int kThreads = 64, kBlocks = 6, kElements = kBlocks * kThreads;
constexpr int kSectorBytes = 32, kSectorsOfBlock = kThreads * sizeof(float) / kSectorBytes;

// Floats that begin with a sector.
class Aligned {
 public:
  explicit Aligned(const char* name, int count) : sectors_(new Sector[count * sizeof(float) / sizeof(Sector)]()) {
    cbam_fused::announce(get(), count * sizeof(float), name, false);
  }
  float* get() const { return sectors_[0].values; }

 private:
  struct alignas(kSectorBytes) Sector {
    float values[kSectorBytes / sizeof(float)];
  };
  std::unique_ptr<Sector[]> sectors_;
};

void expect_reuse(const std::map<std::string, uint64_t>& expected) {
  const auto got = simt::reuse();
  expect_equal("tensors touched", got.size(), expected.size());
  for (const auto& [name, bytes] : expected) expect_equal("bytes between two uses of " + name, got.at(name), bytes);
}

void count_reuse() {
  simt::settings.count_reuse = true;
  simt::settings.order = simt::Order::kAscending;
  simt::settings.resident = 1;
}

__global__ void copy_kernel(const float* x, float* y) {  // [kElements]
  const int i = blockIdx.x * kThreads + threadIdx.x;
  store(y + i, load(x + i));
}

// Between two launches of a copy: everything but the sector itself.
Result copied_twice() {
  count_reuse();
  const Aligned x("x", kElements), y("y", kElements);
  const Grid grid = {kBlocks, kThreads};
  launch(copy_kernel, grid, x.get(), y.get());
  expect_reuse({{"x", 0}, {"y", 0}});
  launch(copy_kernel, grid, x.get(), y.get());
  constexpr uint64_t kAllOthers = 2 * kElements * sizeof(float) - kSectorBytes;
  expect_reuse({{"x", kAllOthers}, {"y", kAllOthers}});
  simt::reset_reuse();
  launch(copy_kernel, grid, x.get(), y.get());
  expect_reuse({{"x", 0}, {"y", 0}});
  return {};
}

// Each block reads its own part of x and that of the next one, and both once more.
__global__ void neighbours_kernel(const float* x,  // [kElements + kThreads]
                                  float* y) {      // [kElements]
  const int i = blockIdx.x * kThreads + threadIdx.x;
  store(y + i, load(x + i) + load(x + i + kThreads));
  __syncthreads();
  load(x + i);
  load(x + i + kThreads);
}

// Between a block's use of the k-th sector of the next part and the next block's: the k-th of y, and in both blocks
// together all others once, of x's part, of the one that only one of the blocks reads, and of y.
Result shared_with_next() {
  count_reuse();
  const Aligned x("x", kElements + kThreads), y("y", kElements);
  launch(neighbours_kernel, {kBlocks, kThreads}, x.get(), y.get());
  expect_reuse({{"x", kSectorBytes * (1 + 3 * (kSectorsOfBlock - 1))}, {"y", 0}});
  return {};
}

// Memory that another tensor had before: its uses are not those of the new one.
Result memory_of_another() {
  count_reuse();
  const Aligned x("x", kElements), y("y", kElements);
  launch(copy_kernel, {kBlocks, kThreads}, x.get(), y.get());
  cbam_fused::forget_announced();
  cbam_fused::announce(y.get(), kElements * sizeof(float), "z", false);
  cbam_fused::announce(x.get(), kElements * sizeof(float), "w", false);
  launch(copy_kernel, {kBlocks, kThreads}, x.get(), y.get());
  expect_reuse({{"w", 0}, {"x", 0}, {"y", 0}, {"z", 0}});
  return {};
}

const Case kCases[] = {
    {"copied_twice", copied_twice},
    {"shared_with_next", shared_with_next},
    {"memory_of_another", memory_of_another},
};

}  // namespace planted::reuse
