// Tensors of x's size at addresses that kernels can read in vectors.
#pragma once

#include "../tensors.h"

namespace cbam_fused {

// t, or a copy where t begins inside a vector of 16 bytes. Which elements a thread has must follow from the shape
// alone.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}
inline OptionalTensor aligned(const OptionalTensor& t) { return t ? OptionalTensor(aligned(*t)) : std::nullopt; }

}  // namespace cbam_fused
