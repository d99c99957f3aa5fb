// A fiber: a stack of its own, on which one CUDA thread runs until it suspends itself. All fibers, and the host code
// that resumes them, share one thread of the operating system. x86-64 only.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume calls entry, on an empty stack.
  void prepare(void (*entry)());
  // Host: runs the fiber until it suspends or finishes.
  void resume();
  // In the fiber: back to the host, until it is resumed.
  void suspend();
  // In the fiber: back to the host for good.
  [[noreturn]] void finish();

  // Host, of a fiber that will not be resumed: what it did happened before an acquire of the token.
  void abandon(void* token);

  // Whether the stack ever grew past its end, or almost.
  bool overflowed() const;

 private:
  static void start();
  void leave(bool for_good);

  char* stack_;
  size_t offset_;  // of the stack's top: different for each fiber
  void* stack_pointer_ = nullptr;
  void (*entry_)() = nullptr;
  void* saved_ = nullptr;    // AddressSanitizer's
  void* context_ = nullptr;  // ThreadSanitizer's
};

}  // namespace simt
