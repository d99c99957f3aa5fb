// cp.async: copies from global to shared memory that a thread begins, commits in groups, and waits for.
#pragma once

#include <cstddef>

namespace simt {

// The last `zeros` of the bytes are set to 0 instead.
void begin_copy(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
// Until at most so many of the latest groups are under way.
void wait_for_copies(size_t groups);

}  // namespace simt
