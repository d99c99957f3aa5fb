// Clusters: the part of cooperative groups that the project's kernels use.
#pragma once

#include <cuda_runtime.h>

#include "../runtime/shared_memory.h"

namespace cooperative_groups {

class cluster_group {
 public:
  void sync(simt::Place place = simt::Place::here()) const { simt::cluster_barrier(place); }
  unsigned block_rank() const { return simt::current->block->rank; }
  unsigned num_blocks() const { return unsigned(simt::current->block->cluster->blocks.size()); }
  template <class T>
  T* map_shared_rank(T* p, unsigned rank) const {
    return static_cast<T*>(simt::map_shared_rank(p, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
