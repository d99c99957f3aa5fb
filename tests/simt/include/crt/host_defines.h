// CUDA's words for where code runs and data lies, for the toolkit's headers: all of it is plain C++ here. PyTorch
// brings the other headers that are needed, but not the toolkit's file of this name.
#pragma once

#define __host__
#define __device__
#define __global__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#define CUDARTAPI
#define CUDARTAPI_CDECL
