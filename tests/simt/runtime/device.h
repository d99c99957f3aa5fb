// What the device says of itself.
#pragma once

namespace simt {

// An H200 by default, but for clusters: kernels that are not asked for them do without.
struct Device {
  int capability = 80;
  int multiprocessors = 132;
  int l2_bytes = 60 * 1024 * 1024;
  int shared_bytes = 228 * 1024;
  int block_shared_bytes = 227 * 1024;
  int clusters = 16;  // of a kernel's that run at a time
};

inline Device device;

}  // namespace simt
