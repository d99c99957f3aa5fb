#include "async_copy.h"

#include <algorithm>

#include "global_memory.h"
#include "grid.h"
#include "sanitizers.h"

namespace simt {

void begin_copy(void* shared, const void* global, size_t bytes, size_t zeros) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %zu bytes", bytes);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async of %zu bytes from or to a misaligned address", bytes);
  // As many as are read, in powers of two: what may be read of them is checked like a load.
  for (size_t at = 0, left = bytes - zeros; left > 0;) {
    const size_t part = size_t(1) << (63 - __builtin_clzll(left));
    note_access(static_cast<const char*>(global) + at, part, false);
    at += part;
    left -= part;
  }
  const Unseen unseen;
  auto& groups = current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({shared, global, bytes, zeros});
}

void commit_copies() {
  const Unseen unseen;
  current->copies.emplace_back();
}

void wait_for_copies(size_t groups) {
  auto& copies = current->copies;
  const size_t committed = copies.empty() ? 0 : copies.size() - 1;
  const size_t done = committed > groups ? committed - groups : 0;
  for (size_t i = 0; i < done; ++i)
    for (const AsyncCopy& copy : copies[i]) {
      const size_t read = copy.bytes - copy.zeros;
      std::memcpy(copy.target, copy.source, read);
      std::memset(static_cast<char*>(copy.target) + read, 0, copy.zeros);
    }
  const Unseen unseen;
  copies.erase(copies.begin(), copies.begin() + done);
}

}  // namespace simt
