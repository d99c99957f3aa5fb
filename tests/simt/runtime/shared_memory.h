// Shared memory: an arena for each resident block. Every variable is a slot at the same offset in all of them. Slots
// are filled with 0xff (NaN) when a block starts, and lie apart, so that AddressSanitizer sees what leaves them.
#pragma once

#include "grid.h"

namespace simt {

constexpr size_t kStaticSharedBytes = 48 << 10;  // what a kernel may declare, and use without asking for more
constexpr size_t kSharedBytes = 227 << 10;       // what it may ask for

struct SharedSlot {
  const void* key;  // of the declaration
  const char* name;
  size_t offset, bytes;
};

// The current thread's block's own part of what is declared at `key`.
void* shared_array(const void* key, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared(const void* key, const char* name);

// The place of `p`, an address in the block's own shared memory, in that of another block of the cluster.
void* map_shared_rank(void* p, unsigned rank);

// Whether an address lies in any block's shared memory; where, from its block's beginning; and in which variable.
bool is_shared(const void* p);
size_t offset_in_arena(const void* p);
const SharedSlot* find_shared_slot(const void* p);

void begin_shared_layouts();  // of launches that run together: each has its own
char* shared_arena(unsigned index);
size_t shared_arenas_bytes();  // of all of them
void reset_shared(Block& block);

}  // namespace simt
