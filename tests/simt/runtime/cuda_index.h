// The built-in variables of CUDA, set whenever another thread goes on.
#pragma once

#include "index.h"

inline simt::Index3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;
