// __syncthreads and the barrier of a cluster. Threads that have exited count as arrived, as on the device.
#pragma once

#include "grid.h"

namespace simt {

// Returns how many threads of the block came with a predicate that is true.
int block_barrier(bool predicate, Place place);
void cluster_barrier(Place place);

// The current thread leaves the kernel.
void exit_thread();

}  // namespace simt
