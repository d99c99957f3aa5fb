// Cases of the runner: each allocates its tensors, launches a kernel and compares the result. A case with an error
// planted in its kernel shall fail, the others pass.
#pragma once

#include <cuda_runtime.h>
#include <platform.h>

#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace planted {

// The result, which must be the same under every schedule.
using Result = std::vector<float>;
using Run = std::function<Result()>;

struct Case {
  Case(const std::string& name, Run run);
};

// By name.
const std::vector<std::pair<std::string, Run>>& cases();

// Memory on the device, known to the harness by its name.
template <class T>
class Buffer {
 public:
  Buffer(const char* name, size_t count) : count_(count), values_(new T[count]) {
    cbam_fused::announce(values_.get(), count * sizeof(T), name, true);
  }
  Buffer(const char* name, size_t count, std::function<double(size_t)> value) : Buffer(name, count) {
    for (size_t i = 0; i < count; ++i) values_[i] = T(float(value(i)));
  }
  T* get() const { return values_.get(); }
  T& operator[](size_t i) { return values_[i]; }
  size_t size() const { return count_; }

 private:
  size_t count_;
  std::unique_ptr<T[]> values_;
};

// The values of `got`; throws unless they are the expected ones.
template <class T>
Result expect(Buffer<T>& got, const std::function<double(size_t)>& expected) {
  Result result;
  for (size_t i = 0; i < got.size(); ++i) {
    result.push_back(float(got[i]));
    if (result.back() == float(expected(i))) continue;
    std::ostringstream text;
    text << "wrong result: [" << i << "] is " << result.back() << ", not " << expected(i);
    throw std::runtime_error(text.str());
  }
  return result;
}

template <class T>
void expect_equal(const std::string& what, T got, T expected) {
  if (got == expected) return;
  std::ostringstream text;
  text << what << " is " << got << ", not " << expected;
  throw std::runtime_error(text.str());
}

struct Grid {
  unsigned blocks, threads;
  unsigned cluster = 1;      // blocks of a cluster
  size_t dynamic_bytes = 0;  // of shared memory
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t try_launch(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = grid.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.dynamic_bytes;
  config.stream = grid.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) {
  const cudaError_t status = try_launch(kernel, grid, arguments...);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <class T>
__device__ inline T load(const T* p) {
  cbam_fused::note_load(p, sizeof(T));
  return *p;
}
template <class T>
__device__ inline void store(T* p, T value) {
  cbam_fused::note_store(p, sizeof(T));
  *p = value;
}

}  // namespace planted
