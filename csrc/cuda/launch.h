// Launching kernels. No header of PyTorch is needed.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace cbam_fused {

// Where an operation's kernels run, one after the other, and what the operation is called in errors.
struct Stream {
  cudaStream_t handle;
  const char* operation;
};

struct Grid {
  int64_t blocks;             // none: nothing is launched
  unsigned threads;           // of a block
  size_t dynamic_shared = 0;  // bytes of a block
};

// A block may have this much shared memory unless its kernel is allowed more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr int64_t kMostBlocks = INT32_MAX;

[[noreturn]] inline void fail_launch(const Stream& stream, const char* name, const Grid& grid, const char* why) {
  throw std::runtime_error(std::string(stream.operation) + ": " + name + " could not be launched with " +
                           std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) +
                           " threads and " + std::to_string(grid.dynamic_shared) +
                           " bytes of dynamic shared memory: " + why);
}

// Launches `kernel`, which errors call `name`.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, const char* name, void (*kernel)(Parameters...), const Grid& grid,
            Arguments&&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks < 0 || grid.blocks > kMostBlocks)
    fail_launch(stream, name, grid, "a grid has at most 2^31 - 1 blocks");
  cudaError_t error = cudaSuccess;
  if (grid.dynamic_shared > kDefaultSharedBytes)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(grid.dynamic_shared));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.dynamic_shared;
    config.stream = stream.handle;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) fail_launch(stream, name, grid, cudaGetErrorString(error));
}

}  // namespace cbam_fused
