// cp.async. A copy takes place when it is waited for, so what is read too early is not there yet.
#pragma once

#include <cuda_runtime.h>

#include "../runtime/async_copy.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros = 0) {
  simt::begin_copy(shared, global, bytes, zeros);
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { simt::wait_for_copies(groups); }
