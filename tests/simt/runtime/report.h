// Errors of a kernel: said with the kernel, the block and the thread, and thrown to whoever launched it.
#pragma once

#include <cstring>

namespace simt {

// A place in the source: a default argument Place::here() is where the call stands.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  const char* name() const {
    const char* slash = std::strrchr(file, '/');
    return slash ? slash + 1 : file;
  }
};
inline bool operator==(const Place& a, const Place& b) { return a.line == b.line && !std::strcmp(a.file, b.file); }
inline bool operator!=(const Place& a, const Place& b) { return !(a == b); }

// Ends the launch: it throws std::runtime_error with this text, and where in the grid it was called.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
