#include "barriers.h"

#include "sanitizers.h"
#include "warps.h"

namespace simt {
namespace {

// Suspends the current thread at a barrier of the group, until all have arrived.
template <class Group, class Complete>
void meet(Group& group, State state, Place place, Complete complete_if_all_arrived) {
  Thread* self = current;
  char* token = &group.tokens[group.syncs & 1];
  release(token);
  self->state = state;
  self->place = place;
  ++group.arrived;
  complete_if_all_arrived();
  self->fiber.suspend();
  acquire(token);
}

void new_epoch(Block& block) {
  block.epoch = next_epoch();
  for (Warp& warp : block.warps) warp.epoch = next_epoch();
}

void complete(Block& block) {
  if (block.live == 0 || block.arrived < block.live) return;
  const Thread* first = nullptr;
  for (unsigned i = 0; i < block.size; ++i) {
    Thread& thread = *block.threads[i];
    if (thread.state != State::kAtBlockBarrier) continue;
    if (!first) first = &thread;
    if (thread.place != first->place)
      fail("divergent __syncthreads: thread %u waits at %s:%d, thread %u at %s:%d", unsigned(first->index.x),
           first->place.name(), first->place.line, unsigned(thread.index.x), thread.place.name(), thread.place.line);
    thread.state = State::kReady;
  }
  block.arrived = 0;
  block.result = block.votes;
  block.votes = 0;
  ++block.syncs;
  new_epoch(block);
}

void complete(Cluster& cluster) {
  if (cluster.live == 0 || cluster.arrived < cluster.live) return;
  for (Block* block : cluster.blocks) {
    for (unsigned i = 0; i < block->size; ++i) {
      Thread& thread = *block->threads[i];
      if (thread.state == State::kAtClusterBarrier) thread.state = State::kReady;
    }
    new_epoch(*block);
  }
  cluster.arrived = 0;
  ++cluster.syncs;
  cluster.epoch = next_epoch();
}

}  // namespace

int block_barrier(bool predicate, Place place) {
  Block& block = *current->block;
  block.votes += predicate;
  meet(block, State::kAtBlockBarrier, place, [&] { complete(block); });
  return block.result;
}

void cluster_barrier(Place place) {
  Cluster& cluster = *current->block->cluster;
  meet(cluster, State::kAtClusterBarrier, place, [&] { complete(cluster); });
}

void exit_thread() {
  Thread& self = *current;
  Block& block = *self.block;
  for (const auto& group : self.copies)
    if (!group.empty()) fail("exit with a cp.async that was not waited for");
  if (block.mapped_in == block.cluster->epoch)
    fail("block %u of the cluster exits while another may use its shared memory: no barrier of the cluster since",
         block.rank);
  if (self.fiber.overflowed()) fail("stack overflow");
  self.state = State::kDone;
  leave_warp();
  --block.live;
  --block.cluster->live;
  complete(block);
  complete(*block.cluster);
}

}  // namespace simt
