#include "warps.h"

#include "sanitizers.h"

namespace simt {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;

uint32_t lanes_of(const Warp& warp) { return warp.count < kWarpSize ? (1u << warp.count) - 1 : kAllLanes; }

// Whether every lane of the mask waits in this collective.
bool all_arrived(const Warp& warp, const Thread& self) {
  const uint32_t mask = self.exchange.mask;
  for (unsigned lane = 0; lane < warp.count; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = *warp.lanes[lane];
    if (other.state != State::kInWarp) return false;
    if (other.exchange.mask == mask && other.exchange.kind == self.exchange.kind && other.place == self.place) continue;
    if (other.exchange.mask >> self.lane & 1)
      fail("divergent warp: lane %u is at %s:%d with mask %08x, lane %u at %s:%d with mask %08x", self.lane,
           self.place.name(), self.place.line, mask, lane, other.place.name(), other.place.line, other.exchange.mask);
    return false;
  }
  return true;
}

void complete(Warp& warp, const Exchange& kind) {
  const uint32_t mask = kind.mask;
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < warp.count; ++lane)
    if (mask >> lane & 1) votes |= uint32_t(warp.lanes[lane]->exchange.value[0]) << lane;
  for (unsigned lane = 0; lane < warp.count; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = *warp.lanes[lane];
    Exchange& own = thread.exchange;
    if (own.kind == Exchange::kShuffle) {
      if (unsigned(own.source) >= warp.count || !(mask >> own.source & 1))
        fail("lane %u shuffles from lane %d, which is not in mask %08x", lane, own.source, mask);
      own.result = warp.lanes[own.source]->exchange.value;
    } else {
      std::memcpy(own.result.data(), &votes, sizeof votes);
    }
    thread.state = State::kReady;
  }
  warp.waiting -= __builtin_popcount(mask & lanes_of(warp));
  if (kind.kind != Exchange::kSync) return;
  ++warp.syncs;
  // Lanes outside the mask are not ordered with the others: only a whole warp begins a new epoch.
  if ((mask & warp.live) == warp.live) warp.epoch = next_epoch();
}

}  // namespace

int shuffle_source(Shuffle kind, unsigned lane, int operand, int width) {
  const int own = int(lane), first = own & ~(width - 1), last = first + width - 1;
  switch (kind) {
    case Shuffle::kIndex:
      return first | (operand & (width - 1));
    case Shuffle::kUp:
      return own - operand < first ? own : own - operand;
    case Shuffle::kDown:
      return own + operand > last ? own : own + operand;
    case Shuffle::kXor:
      return (own ^ operand) > last ? own : own ^ operand;
  }
  __builtin_unreachable();
}

const Exchange& exchange(const Exchange& mine, Place place) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  if (!(mine.mask >> self.lane & 1)) fail("%s:%d: lane %u is not in its mask", place.name(), place.line, self.lane);
  if (mine.mask != kAllLanes && (mine.mask & ~lanes_of(warp)))
    fail("%s:%d: mask %08x names lanes that the block does not have", place.name(), place.line, mine.mask);
  if (const uint32_t exited = mine.mask & lanes_of(warp) & ~warp.live)
    fail("%s:%d: lanes %08x of mask %08x have exited", place.name(), place.line, exited, mine.mask);
  self.exchange = mine;
  self.place = place;
  self.state = State::kInWarp;
  char* token = &warp.tokens[warp.syncs & 1];
  if (mine.kind == Exchange::kSync) release(token);
  const unsigned needed = __builtin_popcount(mine.mask & lanes_of(warp));
  if (++warp.waiting >= needed && all_arrived(warp, self)) complete(warp, mine);
  self.fiber.suspend();
  if (mine.kind == Exchange::kSync) acquire(token);
  return self.exchange;
}

void leave_warp() {
  Thread& self = *current;
  Warp& warp = *self.warp;
  for (unsigned lane = 0; lane < warp.count; ++lane) {
    const Thread& other = *warp.lanes[lane];
    if (other.state == State::kInWarp && other.exchange.mask >> self.lane & 1)
      fail("lane %u exits while lane %u waits for it at %s:%d with mask %08x", self.lane, lane, other.place.name(),
           other.place.line, other.exchange.mask);
  }
  warp.live &= ~(1u << self.lane);
}

uint32_t vote(uint32_t mask, bool predicate, Place place) {
  Exchange mine = {};
  mine.kind = Exchange::kVote;
  mine.mask = mask;
  mine.value[0] = predicate;
  uint32_t votes;
  std::memcpy(&votes, exchange(mine, place).result.data(), sizeof votes);
  return votes;
}

void sync_warp(uint32_t mask, Place place) {
  Exchange mine = {};
  mine.kind = Exchange::kSync;
  mine.mask = mask;
  exchange(mine, place);
}

}  // namespace simt
