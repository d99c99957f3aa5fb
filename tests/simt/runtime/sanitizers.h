// What AddressSanitizer and ThreadSanitizer must be told of fibers and of memory that is used again. The runtime itself
// is compiled without instrumentation; SIMT_ADDRESS or SIMT_THREAD say with which of them the kernels are.
#pragma once

#include <cstddef>

#ifdef SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_THREAD
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace simt {

#ifdef SIMT_ADDRESS
inline void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
// Around a switch of stacks: `saved` belongs to the stack that is left, null when it is left for good.
inline void before_switch(void** saved, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(saved, bottom, bytes);
}
inline void after_switch(void* saved, const void** old_bottom, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(saved, old_bottom, old_bytes);
}
#else
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
#endif

#ifdef SIMT_THREAD
constexpr unsigned kMaxFibers = 4096;  // ThreadSanitizer ends at 8128, and takes its time for each
inline void* new_context() { return __tsan_create_fiber(0); }
inline void delete_context(void* context) { __tsan_destroy_fiber(context); }
inline void* this_context() { return __tsan_get_current_fiber(); }
// A switch by itself orders nothing: the device's scheduler does not either.
inline void switch_context(void* context) { __tsan_switch_to_fiber(context, __tsan_switch_to_fiber_no_sync); }
// What happened before a release of the token has happened for who acquires it later.
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }

inline void set_seen(bool seen) {
  if (seen) {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  } else {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
}
#else
constexpr unsigned kMaxFibers = 16384;
inline void* new_context() { return nullptr; }
inline void delete_context(void*) {}
inline void* this_context() { return nullptr; }
inline void switch_context(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void set_seen(bool) {}
#endif

// While one lives, ThreadSanitizer does not see what the runtime does: its own memory may be written by any thread.
// (That the runtime is not instrumented is not enough, since the sanitizer's library sees every memset, memcpy and
// new.) No fiber is left meanwhile.
class Unseen {
 public:
  Unseen() { set(depth_ + 1); }
  ~Unseen() { set(depth_ - 1); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;

  // For a fiber that is left without returning.
  static void end_all() { set(0); }

 private:
  static void set(int depth) {
    if (!depth != !depth_) set_seen(!depth);
    depth_ = depth;
  }
  static inline int depth_ = 0;
};

}  // namespace simt
