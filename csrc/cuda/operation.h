// The host side of an operation of the CUDA backend: the device of x made current, its stream, tensors on it.
#pragma once

#include <dlfcn.h>
#include <platform.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <optional>

#include "../checks.h"
#include "launch.h"
#include "parameter.h"

namespace cbam_fused {

// PyTorch's current stream of a device. Its function for that is in a library which the CPU build of PyTorch does not
// have, so it is looked up instead of linked.
inline cudaStream_t current_stream(int32_t device_index, const char* operation) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, operation, ": this PyTorch has no libtorch_cuda.so");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device_index, &stream) == AOTI_TORCH_SUCCESS, operation, ": no stream of device ",
                  device_index);
  return static_cast<cudaStream_t>(stream);
}

// One call of an operation. The pointers that kernels are given come from here, with the argument's name, so that a
// harness knows all memory they may touch.
class Operation {
 public:
  Operation(const char* name, const Tensor& x) : x_(x), stream_{nullptr, name} {
    if (!x.is_cuda()) return;  // in a harness
    guard_.emplace(x.get_device_index());
    stream_.handle = current_stream(x.get_device_index(), name);
  }
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
  ~Operation() { forget_announced(); }

  const Stream& stream() const { return stream_; }

  // How to serve a workload on this device. resident_fits() is asked where a sample would be held by a cluster.
  template <class Fits>
  Plan plan(Workload workload, Fits resident_fits) const {
    const auto planned = [&] {
      return recording ? cbam_fused::plan(workload, recording->device)
                       : cbam_fused::plan(workload, device(), asked_for());
    };
    Plan chosen = planned();
    if (chosen.row->strategy == Strategy::kResident && !recording && !resident_fits()) {
      workload.resident_bytes = 0;
      chosen = planned();
    }
    if (recording) recording->plan = chosen;
    return chosen;
  }

  // The elements of a dense tensor; null for none.
  template <class T>
  const T* input(const char* name, const Tensor& t) const {
    tell(t, name, false);
    return static_cast<const T*>(address(t));
  }
  template <class T>
  const T* input(const char* name, const OptionalTensor& t) const {
    return t ? input<T>(name, *t) : nullptr;
  }
  // A parameter in the compute type A or the type of x.
  template <class A>
  Parameter<A> parameter(const char* name, const OptionalTensor& t) const {
    if (!t) return {};
    tell(*t, name, false);
    return {address(*t), element_type(*t)};
  }
  // A running statistic, which is updated.
  RunningStatistic running_statistic(const char* name, OptionalTensor& t) const {
    if (!t) return {};
    tell(*t, name, false);
    return {t->mutable_data_ptr(), element_type(*t)};
  }

  // New tensors on the device of x: results, and scratch, which is free for others once the kernels that were launched
  // while it was held have run.
  Tensor empty(const char* name, const std::vector<int64_t>& sizes, ScalarType dtype) const {
    return announced(name, cbam_fused::empty(sizes, dtype, x_));
  }
  template <class A>
  Tensor new_compute(const char* name, const std::vector<int64_t>& sizes) const {
    return empty(name, sizes, compute_dtype<A>());
  }
  Tensor empty_like(const char* name, const Tensor& t) const { return announced(name, torch::stable::empty_like(t)); }

 private:
  // The row that the environment asks for, or null. (For measuring: it is read at every call.)
  const PlanRow* asked_for() const {
    const char* const name = std::getenv("CBAM_FUSED_CUDA_STRATEGY");
    if (!name || !*name) return nullptr;
    for (const PlanRow& row : kAskedFor)
      if (std::string_view(row.name) == name) return &row;
    STD_TORCH_CHECK(false, stream_.operation, ": CBAM_FUSED_CUDA_STRATEGY must be streaming, skewed or resident; got ",
                    name);
  }
  static void tell(const Tensor& t, const char* name, bool fresh) {
    if (!recording) announce(t, name, fresh);
  }
  // Where a tensor is. One without memory, empty or meta, is nowhere, but no null pointer: that stands for no tensor.
  static const void* address(const Tensor& t) {
    const void* const p = t.const_data_ptr();
    return p ? p : reinterpret_cast<const void*>(uintptr_t(64));
  }
  Device device() const {
    if (!x_.is_cuda()) return described(0);
    static const std::vector<Device> devices = [this] {
      int count = 0;
      check(cudaGetDeviceCount(&count));
      std::vector<Device> all;
      for (int index = 0; index < count; ++index) all.push_back(described(index));
      return all;
    }();
    return devices.at(x_.get_device_index());
  }
  Device described(int index) const {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, index));
      return value;
    };
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrL2CacheSize),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }
  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, stream_.operation,
                    ": no properties of a device: ", cudaGetErrorString(error));
  }
  static ElementType element_type(const Tensor& t) {
    switch (t.scalar_type()) {
      case ScalarType::Double:
        return ElementType::kDouble;
      case ScalarType::Half:
        return ElementType::kHalf;
      case ScalarType::BFloat16:
        return ElementType::kBFloat16;
      default:
        return ElementType::kFloat;
    }
  }
  static Tensor announced(const char* name, const Tensor& t) {
    tell(t, name, true);
    return t;
  }

  const Tensor x_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_;
};

// Registers the function `name` as the operation of that name, and as the one that explains itself (see explain.cu).
#define CBAM_OPERATION(name)                                                                           \
  STABLE_TORCH_LIBRARY_IMPL(CBAM_NAMESPACE, CBAM_DISPATCH_KEY, m) { m.impl(#name, TORCH_BOX(&name)); } \
  STABLE_TORCH_LIBRARY_IMPL(CBAM_EXPLAIN_NAMESPACE, Meta, m) { m.impl(#name, TORCH_BOX(&name)); }

}  // namespace cbam_fused
