// CUDA C++ as C++: found before the toolkit's own file, whose types and enumerations it includes. Threads run as fibers
// (runtime/), so barriers, warp collectives and launches are those of a device.
//
// Here is what the project's kernels use, and no more: what is missing does not compile.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../runtime/barriers.h"
#include "../runtime/cuda_index.h"
#include "../runtime/launch.h"
#include "../runtime/warps.h"

#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#undef __launch_bounds__
#define __launch_bounds__(...)

// ---- Barriers and warp collectives ----------------------------------------------------------------------------------

inline void __syncthreads(simt::Place place = simt::Place::here()) { simt::block_barrier(false, place); }
inline int __syncthreads_count(int predicate, simt::Place place = simt::Place::here()) {
  return simt::block_barrier(predicate != 0, place);
}
inline int __syncthreads_or(int predicate, simt::Place place = simt::Place::here()) {
  return simt::block_barrier(predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, simt::Place place = simt::Place::here()) {
  return simt::block_barrier(predicate == 0, place) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, simt::Place place = simt::Place::here()) {
  simt::sync_warp(mask, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::vote(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::vote(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::vote(mask, predicate == 0, place) == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, simt::Place place = simt::Place::here()) {
  return simt::shuffle(simt::Shuffle::kIndex, mask, value, lane, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, simt::Place place = simt::Place::here()) {
  return simt::shuffle(simt::Shuffle::kUp, mask, value, int(by), width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, simt::Place place = simt::Place::here()) {
  return simt::shuffle(simt::Shuffle::kDown, mask, value, int(by), width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = warpSize, simt::Place place = simt::Place::here()) {
  return simt::shuffle(simt::Shuffle::kXor, mask, value, by, width, place);
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
T max(T a, T b) {
  return a < b ? b : a;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }

template <class To, class From>
To simt_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __float_as_int(float value) { return simt_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return simt_bits<unsigned>(value); }
inline float __int_as_float(int value) { return simt_bits<float>(value); }
inline float __uint_as_float(unsigned value) { return simt_bits<float>(value); }

// ---- Launch ---------------------------------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  return simt::launch_kernel(*config, reinterpret_cast<const void*>(kernel),
                             [kernel, values] { std::apply(kernel, values); });
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
