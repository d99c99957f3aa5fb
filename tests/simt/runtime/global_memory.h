// Global memory: the ranges that kernels may touch, each with a name, and what was loaded from and stored to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace simt {

constexpr uintptr_t kSectorBytes = 32;

struct Traffic {
  uint64_t loaded = 0, stored = 0;                  // bytes
  uint64_t loaded_sectors = 0, stored_sectors = 0;  // of 32 bytes, counted once for each request of a warp
};

// Host: kernels may touch the range, until it is forgotten. What is fresh is filled with settings.fill. Until then the
// owner of the memory is kept: given back, it could become that of the harness itself.
void announce(const void* p, size_t bytes, const char* name, bool fresh, std::shared_ptr<const void> owner = nullptr);
void forget_announced();

// In a kernel: the access that comes next. Where the call returns to tells instructions apart.
void note_access(const void* p, size_t bytes, bool store);

bool is_announced(const void* p);

// By name, of all launches since the last reset.
const std::map<std::string, Traffic>& traffic();
void reset_traffic();

// Sectors are counted once for a request, until a block has ended: the next one in its place makes its own requests.
struct Block;
void end_requests(const Block& block);
void reset_requests();

}  // namespace simt
