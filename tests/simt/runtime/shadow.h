// Who touched a byte of shared memory, as far as it matters for races: two threads, at least one of which writes, must
// have a barrier of both between them. __syncwarp is one for threads of a warp, __syncthreads for those of a block, the
// barrier of a cluster for all of it.
#pragma once

#include <cstdint>

#include "grid.h"

namespace simt {

// All who touched the byte since a barrier of all of them, in constant space. Each level says who did in its latest
// epoch: one member of the next larger group, or several. If several blocks of the cluster did, or several warps of the
// block, then whoever comes next is another than one of them, and who exactly they were is of no importance.
class Touches {
 public:
  void note(const Thread& thread) {
    const Block& block = *thread.block;
    cluster_.note(block.cluster->epoch, block.rank);
    block_.note(block.epoch, warp_number(thread));
    warp_.note(thread.warp->epoch, thread.lane);
  }

  // Whether one of them is another thread than this, with no barrier of both since.
  bool conflict(const Thread& thread) const {
    const Block& block = *thread.block;
    return cluster_.another(block.cluster->epoch, block.rank) || block_.another(block.epoch, warp_number(thread)) ||
           warp_.another(thread.warp->epoch, thread.lane);
  }

 private:
  class Level {
   public:
    void note(uint32_t epoch, unsigned member) {
      if (epoch != epoch_) {
        epoch_ = epoch;
        member_ = member;
      } else if (member != member_) {
        member_ = kSeveral;
      }
    }
    bool another(uint32_t epoch, unsigned member) const { return epoch == epoch_ && member != member_; }

   private:
    static constexpr unsigned kSeveral = UINT32_MAX;
    uint32_t epoch_ = 0;
    unsigned member_ = 0;
  };

  static unsigned warp_number(const Thread& thread) { return unsigned(thread.warp - thread.block->warps.data()); }

  Level cluster_, block_, warp_;
};

}  // namespace simt
