// Element types on the device, and their conversion to and from the compute type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../types.h"

namespace cbam_fused {

template <class T>
struct DeviceElementOf {
  using type = T;
};
template <>
struct DeviceElementOf<Half> {
  using type = __half;
};
template <>
struct DeviceElementOf<BFloat16> {
  using type = __nv_bfloat16;
};
// What kernels call the element type T of a tensor.
template <class T>
using DeviceElement = typename DeviceElementOf<T>::type;

__device__ inline float to_compute(float value) { return value; }
__device__ inline double to_compute(double value) { return value; }
__device__ inline float to_compute(__half value) { return __half2float(value); }
__device__ inline float to_compute(__nv_bfloat16 value) { return __bfloat162float(value); }

// value rounded to T, to nearest, ties to even.
template <class T>
__device__ inline T rounded(Compute<T> value) {
  return value;
}
template <>
__device__ inline __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace cbam_fused
