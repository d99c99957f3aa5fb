// Launching kernels. No header of PyTorch is needed.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "planner.h"

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
  unsigned cluster = 1;       // blocks of a cluster
};

// A block may have this much dynamic shared memory, besides what its kernel declares, unless more is allowed.
constexpr size_t kDefaultSharedBytes = 20 * 1024;
constexpr int64_t kMostBlocks = INT32_MAX;

[[noreturn]] inline void fail_launch(const Stream& stream, const char* name, const Grid& grid, const char* why) {
  const std::string clusters = grid.cluster > 1 ? ", in clusters of " + std::to_string(grid.cluster) + "," : "";
  throw std::runtime_error(std::string(stream.operation) + ": " + name + " could not be launched with " +
                           std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) + " threads" +
                           clusters + " and " + std::to_string(grid.dynamic_shared) +
                           " bytes of dynamic shared memory: " + why);
}

// Allows a kernel as much dynamic shared memory as the current device has for it, where a launch needs more than the
// default. Always as much: a launch of another thread may need more than this one.
inline cudaError_t allow_shared(const void* kernel, const Grid& grid) {
  if (grid.dynamic_shared <= kDefaultSharedBytes) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  thread_local std::set<std::pair<const void*, int>> allowed;
  if (error != cudaSuccess || allowed.count({kernel, device})) return error;
  cudaFuncAttributes attributes;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - int(attributes.sharedSizeBytes));
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// A grid as the CUDA runtime wants it described.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster;

  LaunchConfig(const Stream& stream, const Grid& grid) {
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.dynamic_shared;
    config.stream = stream.handle;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// What an operation would do: while there is one, launches of this thread are written down instead.
struct Recording {
  struct Launch {
    const char* name;
    Grid grid;
  };
  Device device;   // that is planned for
  Plan plan = {};  // without a row where there was nothing to plan
  std::vector<Launch> launches;
};
inline thread_local Recording* recording = nullptr;

// Launches `kernel`, which errors call `name`.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, const char* name, void (*kernel)(Parameters...), const Grid& grid,
            Arguments&&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks < 0 || grid.blocks > kMostBlocks)
    fail_launch(stream, name, grid, "a grid has at most 2^31 - 1 blocks");
  if (recording) {
    recording->launches.push_back({name, grid});
    return;
  }
  cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), grid);
  if (error == cudaSuccess) {
    const LaunchConfig config(stream, grid);
    error = cudaLaunchKernelEx(&config.config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) fail_launch(stream, name, grid, cudaGetErrorString(error));
}

}  // namespace cbam_fused
