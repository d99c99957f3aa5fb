// Warp collectives: shuffles, votes and __syncwarp. A collective completes when all lanes of its mask have come to it,
// at the same place in the source. Only __syncwarp orders memory.
#pragma once

#include "grid.h"

namespace simt {

enum class Shuffle { kIndex, kUp, kDown, kXor };

// The lane whose value `lane` gets, among groups of `width` neighbours; its own where there is none.
int shuffle_source(Shuffle kind, unsigned lane, int operand, int width);

// Takes part in a collective; its result is in the returned exchange.
const Exchange& exchange(const Exchange& mine, Place place);

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, int operand, int width, Place place) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Exchange mine = {};
  mine.kind = Exchange::kShuffle;
  mine.mask = mask;
  mine.source = shuffle_source(kind, current->lane, operand, width);
  std::memcpy(mine.value.data(), &value, sizeof value);
  std::memcpy(&value, exchange(mine, place).result.data(), sizeof value);
  return value;
}

// The lanes of the mask whose predicate is true.
uint32_t vote(uint32_t mask, bool predicate, Place place);
void sync_warp(uint32_t mask, Place place);

// The current thread exits: no lane may wait for it.
void leave_warp();

}  // namespace simt
