// How launches are run, from now on.
#pragma once

#include <cstdint>

namespace simt {

enum class Order { kAscending, kDescending, kRandom };

struct Settings {
  Order order = Order::kAscending;  // of blocks as they start, and of threads that can go on
  uint64_t seed = 0;                // of the random order
  unsigned resident = 1;            // clusters (blocks, where there are none) that share the device; 0: all
  bool count_sectors = false;       // count 32-byte sectors, which takes time
  bool count_reuse = false;         // keep what reuse() needs: 16 bytes for each sector that a block touches
  uint8_t fill = 0xff;              // what fresh memory holds in every byte; 0xff makes NaN and -1
  unsigned repeat = 1;              // run every launch so many times, one after the other, on the same memory
};

inline Settings settings;

}  // namespace simt
