// What kernels and operations need that depends on where they run: here, on a GPU. A harness that runs the same source
// on a CPU has a header of this name, which its compiler finds first.
#pragma once

#include <stddef.h>

// Shared memory of a block: `count` elements, a constant; or as much as the launch asks for.
#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                               \
  extern __shared__ __align__(128) unsigned char cbam_fused_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(cbam_fused_dynamic_shared)

namespace cbam_fused {

// Every access of a kernel to device memory. The compiler does not always see by itself that it is no shared memory.
__device__ __forceinline__ void note_load(const void* p, size_t) { __builtin_assume(__isGlobal(p)); }
__device__ __forceinline__ void note_store(const void* p, size_t) { __builtin_assume(__isGlobal(p)); }

// A tensor that the operation's kernels may touch; `fresh`: it was just allocated, and has no values yet.
template <class Tensor>
void announce(const Tensor&, const char* /*name*/, bool /*fresh*/) {}
// The end of the operation.
inline void forget_announced() {}

}  // namespace cbam_fused
