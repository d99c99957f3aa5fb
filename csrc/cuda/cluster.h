// Clusters: blocks that run at the same time and can read each other's shared memory. There are none before sm_90,
// where CBAM_HAS_CLUSTERS is not defined for device code.
#pragma once

#include <cooperative_groups.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CBAM_HAS_CLUSTERS

namespace cbam_fused {

// The block's number in its cluster.
__device__ inline int cluster_rank() { return int(cooperative_groups::this_cluster().block_rank()); }

// A barrier for all threads of the cluster; what they wrote to shared memory before it can be read after it.
__device__ inline void cluster_meet() { cooperative_groups::this_cluster().sync(); }

// What is in the shared memory of block `rank` where p is in that of this one.
template <class T>
__device__ inline const T* in_block(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}

}  // namespace cbam_fused
#endif
