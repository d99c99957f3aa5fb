// How blocks wait for each other, where a kernel lets them. The other file of this name is csrc/cuda/device/flags.h.
#pragma once

#include "../runtime/flags.h"

namespace cbam_fused {

using simt::release_add;
using simt::take_ticket;

inline void wait_at_least(const int32_t* flag, int32_t n, simt::Place place = simt::Place::here()) {
  simt::wait_at_least(flag, n, place);
}

}  // namespace cbam_fused
