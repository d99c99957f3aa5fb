#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "sanitizers.h"

// void simt_switch(void** save, void* load): pushes the registers that a callee must keep, stores the stack pointer at
// `save`, and continues where the stack `load` was left in the same way.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, . - simt_switch
)");
extern "C" void simt_switch(void** save, void* load);

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kSavedRegisters = 6;
constexpr uint64_t kCanary = 0x5354414b5f454e44;

// The stack of the host code that resumed the running fiber.
struct Host {
  void* stack_pointer = nullptr;
  void* saved = nullptr;
  void* context = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
} host;

Fiber* running = nullptr;

}  // namespace

Fiber::Fiber() : context_(new_context()) {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  // Stacks whose tops lie a power of two apart would share one set of the cache.
  static size_t count = 0;
  offset_ = 64 + count++ * 448 % 16384;
}

Fiber::~Fiber() {
  delete_context(context_);
  unpoison(stack_, kStackBytes);
  munmap(stack_, kStackBytes);
}

void Fiber::prepare(void (*entry)()) {
  entry_ = entry;
  saved_ = nullptr;
  unpoison(stack_, kStackBytes);  // what an earlier thread left without returning
  std::memcpy(stack_, &kCanary, sizeof kCanary);
  auto top = reinterpret_cast<void**>(stack_ + kStackBytes - offset_);
  *--top = nullptr;  // start() has no caller
  *--top = reinterpret_cast<void*>(&Fiber::start);
  top -= kSavedRegisters;
  std::memset(top, 0, kSavedRegisters * sizeof(void*));
  stack_pointer_ = top;
}

void Fiber::start() {
  after_switch(nullptr, &host.bottom, &host.bytes);
  running->entry_();
  running->finish();
}

void Fiber::resume() {
  running = this;
  host.context = this_context();
  before_switch(&host.saved, stack_, kStackBytes);
  switch_context(context_);
  simt_switch(&host.stack_pointer, stack_pointer_);
  after_switch(host.saved, nullptr, nullptr);
}

void Fiber::leave(bool for_good) {
  before_switch(for_good ? nullptr : &saved_, host.bottom, host.bytes);
  switch_context(host.context);
  simt_switch(&stack_pointer_, host.stack_pointer);
  after_switch(saved_, &host.bottom, &host.bytes);
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
  leave(true);
  std::abort();
}

void Fiber::abandon(void* token) {
  void* own = this_context();
  switch_context(context_);
  release(token);
  switch_context(own);
}

bool Fiber::overflowed() const { return std::memcmp(stack_, &kCanary, sizeof kCanary) != 0; }

}  // namespace simt
