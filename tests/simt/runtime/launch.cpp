#include "launch.h"

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>

#include "grid.h"
#include "scheduler.h"
#include "settings.h"
#include "shared_memory.h"

namespace simt {
namespace {

constexpr unsigned kMaxThreads = 1024, kMaxCluster = 8;

std::vector<LaunchRecord> records;
std::map<const void*, size_t> allowed_dynamic_bytes;  // by cudaFuncSetAttribute
cudaError_t last_error = cudaSuccess;

// The kernel's name, with its template arguments: of the symbol, which must not be local to its file.
std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel) return "a kernel without a symbol";
  int status;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  if (!demangled) return info.dli_sname;
  std::string name = demangled;
  std::free(demangled);
  // void f<T>(arguments): without `void` and arguments.
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  size_t depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = config.attrs[i].val.clusterDim;
      return dim3(cluster.x, cluster.y, cluster.z);
    }
  return dim3(1, 1, 1);
}

// Whether the device takes it; see the table of technical specifications in the CUDA programming guide.
cudaError_t check(const Launch& launch, const void* kernel) {
  const auto fits = [](dim3 d, uint64_t x, uint64_t yz) {
    return d.x > 0 && d.y > 0 && d.z > 0 && d.x <= x && d.y <= yz && d.z <= yz;
  };
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  if (!fits(grid, INT32_MAX, 65535) || !fits(block, kMaxThreads, kMaxThreads) || block.z > 64 ||
      uint64_t(block.x) * block.y * block.z > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  if (!fits(cluster, kMaxCluster, kMaxCluster) || cluster.x * cluster.y * cluster.z > kMaxCluster ||
      grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return cudaErrorInvalidClusterSize;
  const auto allowed = allowed_dynamic_bytes.find(kernel);
  const size_t most = allowed == allowed_dynamic_bytes.end() ? kStaticSharedBytes : allowed->second;
  return launch.dynamic_bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

std::vector<Launch>* enqueued = nullptr;  // within run_together: what is to be run

void run_repeatedly(const std::vector<Launch>& launches) {
  for (unsigned i = 0; i < settings.repeat; ++i) run(launches);
}

}  // namespace

const std::vector<LaunchRecord>& launches() { return records; }
void reset_launches() { records.clear(); }

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  Launch launch = {name_of(kernel),         config.gridDim, config.blockDim, cluster_of(config),
                   config.dynamicSmemBytes, config.stream,  std::move(body)};
  if (const cudaError_t status = check(launch, kernel); status != cudaSuccess) return last_error = status;
  const auto volume = [](dim3 d) { return d.x * d.y * d.z; };
  records.push_back(
      {launch.kernel, volume(launch.grid), volume(launch.block), volume(launch.cluster), launch.dynamic_bytes});
  if (enqueued)
    enqueued->push_back(std::move(launch));
  else
    run_repeatedly({std::move(launch)});
  return cudaSuccess;
}

void run_together(const std::function<void()>& enqueue) {
  std::vector<Launch> launches;
  enqueued = &launches;
  try {
    enqueue();
  } catch (...) {
    enqueued = nullptr;
    throw;
  }
  enqueued = nullptr;
  std::set<cudaStream_t> streams;
  for (const Launch& launch : launches)
    if (!streams.insert(launch.stream).second) throw std::runtime_error("run_together: two launches on one stream");
  run_repeatedly(launches);
}

}  // namespace simt

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return simt::last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    default:
      return "another CUDA error";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > simt::kSharedBytes) return simt::last_error = cudaErrorInvalidValue;
  simt::allowed_dynamic_bytes[function] = size_t(value);
  return cudaSuccess;
}

}  // extern "C"
