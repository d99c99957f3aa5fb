// What kernel source calls by one name on the device and here. The other file of this name is
// csrc/cuda/device/platform.h.
#pragma once

#include <cuda_runtime.h>

#include "../runtime/global_memory.h"
#include "../runtime/shared_memory.h"

// T name[count] in shared memory, and the part whose size the launch gives.
#define SHARED_ARRAY(T, name, count)        \
  static const char simt_key_of_##name = 0; \
  T* const name = static_cast<T*>(simt::shared_array(&simt_key_of_##name, #name, sizeof(T) * (count), alignof(T)))
#define DYNAMIC_SHARED(T, name)             \
  static const char simt_key_of_##name = 0; \
  T* const name = static_cast<T*>(simt::dynamic_shared(&simt_key_of_##name, #name))

namespace cbam_fused {

// Inlined, so that each access has a return address of its own.
[[gnu::always_inline]] inline void note_load(const void* p, size_t bytes) { simt::note_access(p, bytes, false); }
[[gnu::always_inline]] inline void note_store(const void* p, size_t bytes) { simt::note_access(p, bytes, true); }

using simt::announce;
template <class Tensor>
void announce(const Tensor& t, const char* name, bool fresh) {
  announce(t.const_data_ptr(), t.numel() * t.element_size(), name, fresh, std::make_shared<const Tensor>(t));
}
using simt::forget_announced;

}  // namespace cbam_fused
