// Blocks that wait for each other through flags in global memory.
#include <flags.h>

#include "case.h"

namespace planted::flags {

using cbam_fused::release_add;
using cbam_fused::take_ticket;
using cbam_fused::wait_at_least;

enum class Bug { kNone, kBlockIndex, kWaitForLater, kSignalFirst, kNeverSignalled };

// Each block adds 1 to what the one before it has left; the first starts from 0. Sound with any number of resident
// blocks in any order, since a block waits only for those with smaller tickets.
template <Bug bug>
__global__ void chain_kernel(float* values,     // [blocks + 1]
                             int32_t* flags,    // [blocks + 1]
                             int32_t* tickets,  // [1]
                             int blocks) {
  if (threadIdx.x > 0) return;
  const int ticket = bug == Bug::kBlockIndex ? int(blockIdx.x) : take_ticket(tickets);
  const int own = bug == Bug::kWaitForLater ? blocks - 1 - ticket : ticket;
  wait_at_least(flags + own, 1);
  const float value = load(values + own) + 1;
  if (bug == Bug::kSignalFirst) release_add(flags + own + 1, 1);
  store(values + own + 1, value);
  if (bug != Bug::kSignalFirst && bug != Bug::kNeverSignalled) release_add(flags + own + 1, 1);
}

template <Bug bug>
Result chain() {
  constexpr int kBlocks = 12;
  Buffer<float> values("values", kBlocks + 1);
  Buffer<int32_t> flags("flags", kBlocks + 1, [](size_t i) { return i == 0; });
  Buffer<int32_t> tickets("tickets", 1, [](size_t) { return 0; });
  values[0] = 0;
  launch(chain_kernel<bug>, {kBlocks, 32}, values.get(), flags.get(), tickets.get(), kBlocks);
  return expect(values, [](size_t i) { return i; });
}

const Case kCases[] = {
    {"chain", chain<Bug::kNone>},
    {"wait_for_smaller_block_index", chain<Bug::kBlockIndex>},
    {"wait_for_larger_ticket", chain<Bug::kWaitForLater>},
    {"signal_before_store", chain<Bug::kSignalFirst>},
    {"never_signalled", chain<Bug::kNeverSignalled>},
};

}  // namespace planted::flags
