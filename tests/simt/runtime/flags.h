// Flags in global memory, the only way in which blocks that are not in one cluster may wait for each other.
#pragma once

#include "grid.h"

namespace simt {

// 0, 1, 2 and so on from a counter that is 0 at first, in the order in which threads come here. A block that began
// earlier is known to run, or to have run, where it took the smaller ticket; of the smaller blockIdx that is not known.
int32_t take_ticket(int32_t* counter);
// Adds n to the flag; what this thread wrote before is visible to who sees the sum.
void release_add(int32_t* flag, int32_t n);
// Parks the thread until the flag is at least n.
void wait_at_least(const int32_t* flag, int32_t n, Place place);

}  // namespace simt
