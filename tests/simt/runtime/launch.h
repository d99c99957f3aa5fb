// The launch of a kernel, and the few other functions of the CUDA runtime that host code calls.
#pragma once

#include <driver_types.h>

#include <functional>
#include <string>
#include <vector>

namespace simt {

struct LaunchRecord {
  std::string kernel;
  unsigned blocks, threads, cluster;  // threads of a block, blocks of a cluster
  size_t dynamic_bytes;
};

// Every launch since the last reset.
const std::vector<LaunchRecord>& launches();
void reset_launches();

// Runs the kernel before it returns, as often as settings.repeat says: one launch, for those who count. A configuration
// that the device refuses is an error code, as there; what the kernel does wrong is thrown as std::runtime_error.
cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

// Runs what the function launches when the function has returned, all at a time, as streams may: each launch must be on
// a stream of its own.
void run_together(const std::function<void()>& enqueue);

}  // namespace simt
