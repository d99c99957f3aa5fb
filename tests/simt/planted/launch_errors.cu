// csrc/cuda/launch.h: what an operation says where a kernel cannot be launched, and that nothing is, for no blocks.
#include "../../../csrc/cuda/launch.h"
#include "../runtime/launch.h"
#include "case.h"

namespace planted::launch_errors {

__global__ void idle_kernel(int) {}

constexpr cbam_fused::Stream kStream = {nullptr, "cbam_operation"};

std::string error_of(const cbam_fused::Grid& grid) {
  try {
    cbam_fused::launch(kStream, "idle_kernel", idle_kernel, grid, 1);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

Result launch_errors() {
  const std::string begin = "cbam_operation: idle_kernel could not be launched with ";
  expect_equal<std::string>("the error", error_of({1, 32}), "none");
  const size_t before = simt::launches().size();
  expect_equal<std::string>("the error for no blocks", error_of({0, 32}), "none");
  expect_equal("launches for no blocks", simt::launches().size(), before);
  expect_equal("the error for too many blocks", error_of({int64_t(1) << 31, 32}),
               begin + "2147483648 blocks of 32 threads and 0 bytes of dynamic shared memory: " +
                   "a grid has at most 2^31 - 1 blocks");
  expect_equal("the error for too many threads", error_of({2, 2048, 16}),
               begin + "2 blocks of 2048 threads and 16 bytes of dynamic shared memory: " +
                   cudaGetErrorString(cudaErrorInvalidConfiguration));
  expect_equal("the error for too much shared memory", error_of({2, 32, 1 << 20}),
               begin + "2 blocks of 32 threads and 1048576 bytes of dynamic shared memory: " +
                   cudaGetErrorString(cudaErrorInvalidValue));
  expect_equal<std::string>("more shared memory", error_of({1, 32, 100 << 10}), "none");
  return {};
}

const Case kCase = {"launch_errors", launch_errors};

}  // namespace planted::launch_errors
