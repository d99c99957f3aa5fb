// Every access to memory that the compiler emits in a kernel, in mode `access`: it compiles kernels for
// ThreadSanitizer, whose functions are these. So races in shared memory are found exactly, whatever the schedule, and
// so is global memory that is touched past the counting loads and stores.
#include <sys/mman.h>

#include <new>

#include "global_memory.h"
#include "grid.h"
#include "shadow.h"
#include "shared_memory.h"

namespace simt {
namespace {

struct Byte {
  Touches loads, stores;
};

// As the arenas lie behind each other, so do their shadows.
Byte* shadow_of(const void* p) {
  static Byte* const shadow = [] {
    void* memory = mmap(nullptr, shared_arenas_bytes() * sizeof(Byte), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<Byte*>(memory);  // zeros: no epoch that ever is
  }();
  return shadow + (static_cast<const char*>(p) - shared_arena(0));
}

void shared_access(const char* p, size_t bytes, size_t alignment, bool store) {
  const SharedSlot* slot = find_shared_slot(p);
  const char* access = store ? "store" : "load";
  if (!slot || offset_in_arena(p) + bytes > slot->offset + slot->bytes)
    fail("%s of %zu bytes outside of what is declared in shared memory%s%s", access, bytes,
         slot ? ": at the end of " : "", slot ? slot->name : "");
  const size_t element = offset_in_arena(p) - slot->offset;
  if (element % alignment || offset_in_arena(p) % alignment)
    fail("%s of %zu bytes at a misaligned address: byte %zu of %s", access, bytes, element, slot->name);
  for (Byte* byte = shadow_of(p); byte < shadow_of(p) + bytes; ++byte) {
    if (byte->stores.conflict(*current) || (store && byte->loads.conflict(*current)))
      fail("race in shared memory: %s of byte %td of %s, which another thread %s with no barrier between", access,
           ptrdiff_t(element) + (byte - shadow_of(p)), slot->name,
           byte->stores.conflict(*current) ? "stored to" : "loads");
    (store ? byte->stores : byte->loads).note(*current);
  }
}

void global_access(uintptr_t address, size_t bytes, bool store) {
  Thread& self = *current;
  if (address < self.noted_begin || address + bytes > self.noted_end || bytes > self.noted_left)
    fail("%s of %zu bytes of global memory that was not noted", store ? "store" : "load", bytes);
  self.noted_left -= bytes;
}

void access(const void* p, size_t bytes, size_t alignment, bool store) {
  if (!current) return;
  if (is_shared(p))
    shared_access(static_cast<const char*>(p), bytes, alignment, store);
  else if (is_announced(p))
    global_access(reinterpret_cast<uintptr_t>(p), bytes, store);
}

}  // namespace
}  // namespace simt

extern "C" {

#define SIMT_ACCESSES(bytes)                                                             \
  void __tsan_read##bytes(const void* p) { simt::access(p, bytes, bytes, false); }       \
  void __tsan_write##bytes(const void* p) { simt::access(p, bytes, bytes, true); }       \
  void __tsan_unaligned_read##bytes(const void* p) { simt::access(p, bytes, 1, false); } \
  void __tsan_unaligned_write##bytes(const void* p) { simt::access(p, bytes, 1, true); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(const void* p, size_t bytes) { simt::access(p, bytes, 1, false); }
void __tsan_write_range(const void* p, size_t bytes) { simt::access(p, bytes, 1, true); }

void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// Atomic operations of host code.
#define SIMT_ATOMICS(bits, T)                                                                                       \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {                           \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                         \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {                             \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                          \
  }
SIMT_ATOMICS(8, uint8_t)
SIMT_ATOMICS(32, uint32_t)
SIMT_ATOMICS(64, uint64_t)

}  // extern "C"
