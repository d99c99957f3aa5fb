#include "flags.h"

#include "global_memory.h"
#include "sanitizers.h"

namespace simt {

int32_t take_ticket(int32_t* counter) {
  note_access(counter, sizeof *counter, true);
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

void release_add(int32_t* flag, int32_t n) {
  note_access(flag, sizeof *flag, true);
  release(flag);
  __atomic_fetch_add(flag, n, __ATOMIC_RELEASE);
  current->fiber.suspend();  // so that who waits for it may go on before this thread does
}

void wait_at_least(const int32_t* flag, int32_t n, Place place) {
  note_access(flag, sizeof *flag, false);
  Thread* self = current;
  self->flag = flag;
  self->awaited = n;
  self->place = place;
  self->state = State::kAtFlag;
  self->fiber.suspend();
  acquire(const_cast<int32_t*>(flag));
}

}  // namespace simt
