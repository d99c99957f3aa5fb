// The threads of running launches: warps in blocks in clusters. A grid without clusters has clusters of one block.
#pragma once

#include <driver_types.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "fiber.h"
#include "index.h"
#include "report.h"

namespace simt {

constexpr unsigned kWarpSize = 32;

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtClusterBarrier, kInWarp, kAtFlag, kDone };

// What a lane brings to a collective of its warp, and gets.
struct Exchange {
  enum Kind : uint8_t { kShuffle, kVote, kSync } kind;
  uint32_t mask;
  int source;  // lane whose value a shuffle gets
  alignas(16) std::array<unsigned char, 16> value, result;
};

// A copy that cp.async began.
struct AsyncCopy {
  void* target;
  const void* source;
  size_t bytes, zeros;  // the last `zeros` of the bytes are 0 and not read
};

struct Warp;
struct Block;
struct Cluster;

struct Thread {
  Fiber fiber;
  Index3 index;
  unsigned lane;
  Warp* warp;
  Block* block;
  State state;
  Place place;  // of the barrier, collective or wait at which it stands
  Exchange exchange;
  const int32_t* flag;  // it waits for it to be `awaited` or more
  int32_t awaited;
  uintptr_t noted_begin, noted_end;               // the access to global memory that is under way
  size_t noted_left;                              // bytes of it that are still to come
  std::vector<std::vector<AsyncCopy>> copies;     // groups; the last is not committed yet
  std::vector<std::pair<void*, unsigned>> sites;  // accesses by place in the code, while sectors are counted
};

// `epoch`s number the stretches between two barriers; all are different. `tokens` are what ThreadSanitizer sees of a
// barrier: a thread that has passed one may arrive at the next before others have left, so there are two, in turns.
struct Warp {
  std::array<Thread*, kWarpSize> lanes;
  unsigned count;    // of lanes
  uint32_t live;     // mask of lanes that have not exited
  unsigned waiting;  // in collectives
  uint32_t epoch;
  unsigned syncs;
  char tokens[2];
};

struct Block {
  Index3 index;
  unsigned rank;  // in the cluster
  Cluster* cluster;
  char* shared;  // its shared memory
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned size;  // of threads: the first so many
  std::vector<Warp> warps;
  unsigned live;     // threads that have not exited
  unsigned arrived;  // at the barrier
  int votes;         // predicates that were true, of those who arrived
  int result;        // the same, of the last barrier
  uint32_t epoch;
  uint32_t mapped_in;  // the cluster's epoch in which a peer last took the address of its shared memory
  unsigned syncs;
  char tokens[2];
  char reuse;                             // token between blocks that use this one's memory in turn
  std::unordered_set<uintptr_t> touched;  // sectors, while settings.count_reuse is set
};

struct Launch {
  std::string kernel;
  dim3 grid, block, cluster;
  size_t dynamic_bytes;  // of shared memory
  cudaStream_t stream;
  std::function<void()> body;
};

struct Cluster {
  const Launch* launch;
  std::vector<Block*> blocks;
  unsigned live;  // threads
  unsigned arrived;
  uint32_t epoch;
  unsigned syncs;
  char tokens[2];
};

inline Thread* current = nullptr;       // the thread that runs; null in host code
inline const Launch* launch = nullptr;  // its launch
inline uint32_t last_epoch = 0;

inline uint32_t next_epoch() { return ++last_epoch; }

}  // namespace simt
