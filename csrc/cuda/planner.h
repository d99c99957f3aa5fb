// Which strategy an operation takes, from the shape, the options and the device alone. All strategies give the same
// results to the bit. No header of PyTorch or CUDA is needed.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "../types.h"

namespace cbam_fused {

struct Device {
  int64_t capability;  // 90: sm_90
  int64_t multiprocessors;
  int64_t l2_bytes;
  int64_t shared_bytes;        // that a multiprocessor has
  int64_t block_shared_bytes;  // that a block may have
};

// A pass of x through cbam_attend or cbam_inference.
struct Workload {
  Shape shape;
  int64_t sample_bytes;   // of x
  int64_t scratch_bytes;  // of a sample: what one pass leaves for the next, maps and partial sums
  int64_t weight_bytes;   // of the MLP, which each group needs
  bool applies;           // y is written: cbam_inference
  bool adds_residual;
  bool has_skewed_kernel;   // for the dtype, the options and the alignment of the rows
  int64_t resident_blocks;  // of a cluster that holds a sample
  int64_t resident_bytes;   // of shared memory for each of them; 0: there is no kernel

  // Bytes that are touched from one use of a sample to the next in the skewed order, for each byte of its groups.
  int64_t skewed_footprint() const {
    return applies ? sample_bytes * (3 + adds_residual) + 3 * scratch_bytes : 2 * (sample_bytes + scratch_bytes);
  }
};

enum class Strategy { kStreaming, kSkewed, kResident };

// The part of the L2 that data may take up and be found there again, while other data passes through.
constexpr double kShareOfL2 = 0.4;
// Bytes of x of a group that each multiprocessor needs at least, to have enough loads under way in each step: three
// groups are read side by side, and about 48 KB in flight are a multiprocessor's share of the memory's speed.
constexpr int64_t kStepBytes = 32 * 1024;

inline int64_t skewed_group_samples(const Workload& w, const Device& d) {
  const int64_t room = int64_t(kShareOfL2 * double(d.l2_bytes)) - w.weight_bytes;
  return std::max<int64_t>(room, 0) / std::max<int64_t>(w.skewed_footprint(), 1);
}

// Bytes of weights that a block of a cluster reads in little time, beside its part of x: a multiprocessor reads at most
// 64 bytes a clock.
constexpr int64_t kWeightsOfBlock = 128 * 1024;
// That every block takes besides what it asks for.
constexpr int64_t kReservedBytes = 1024;

inline bool has_resident_kernel(const Workload& w, const Device& d) {
  return d.capability >= 90 && w.resident_bytes > 0 && w.resident_bytes <= d.block_shared_bytes;
}

struct PlanRow {
  const char* name;
  bool (*applies)(const Workload&, const Device&);
  Strategy strategy;
  bool reads_x_once;  // from device memory, if the cache does what is expected of it
  const char* reason;
};

// The first row that applies is taken.
constexpr PlanRow kPlanRows[] = {
    {"resident",
     [](const Workload& w, const Device& d) {
       return has_resident_kernel(w, d) && 2 * (w.resident_bytes + kReservedBytes) <= d.shared_bytes &&
              w.weight_bytes <= kWeightsOfBlock * w.resident_blocks;
     },
     Strategy::kResident, true,
     "a cluster of blocks holds a sample in its shared memory, and a multiprocessor holds two blocks: one loads while "
     "the other computes"},
    {"in_cache",
     [](const Workload& w, const Device& d) {
       return double(w.shape.n) * double(w.sample_bytes) <= kShareOfL2 * double(d.l2_bytes);
     },
     Strategy::kStreaming, true, "x is at most 0.4 of the L2 cache and stays there from one pass to the next"},
    {"no_skewed_kernel", [](const Workload& w, const Device&) { return !w.has_skewed_kernel; }, Strategy::kStreaming,
     false,
     "there is no skewed kernel for float64, ties=even, lp or lse pooling, a single-layer MLP, a large one, no spatial "
     "gate, or rows that are no whole vectors"},
    {"heavy_mlp", [](const Workload& w, const Device&) { return 16 * w.weight_bytes > w.sample_bytes; },
     Strategy::kStreaming, false,
     "the MLP's weights are more than a sixteenth of a sample, and each block that pools channels would read them all"},
    {"small_cache",
     [](const Workload& w, const Device& d) {
       return skewed_group_samples(w, d) * w.sample_bytes < kStepBytes * d.multiprocessors;
     },
     Strategy::kStreaming, false,
     "groups of samples that stay in the L2 cache between passes would leave multiprocessors idle; the passes walk in "
     "turns from the first sample and from the last"},
    {"skewed", [](const Workload&, const Device&) { return true; }, Strategy::kSkewed, true,
     "x is read from device memory once: the passes follow each other group by group of samples, which stay in the L2 "
     "cache in between"},
};

struct Plan {
  const PlanRow* row;
  int64_t group_samples;  // kSkewed: of one group
};

// Of those that are asked for, whatever the table says.
constexpr PlanRow kAskedFor[] = {
    {"streaming", nullptr, Strategy::kStreaming, false, "CBAM_FUSED_CUDA_STRATEGY asks for it"},
    {"skewed", nullptr, Strategy::kSkewed, false, "CBAM_FUSED_CUDA_STRATEGY asks for it"},
    {"resident", nullptr, Strategy::kResident, true, "CBAM_FUSED_CUDA_STRATEGY asks for it"},
};

inline bool is_possible(Strategy strategy, const Workload& w, const Device& d) {
  return strategy == Strategy::kStreaming || (strategy == Strategy::kSkewed && w.has_skewed_kernel) ||
         (strategy == Strategy::kResident && has_resident_kernel(w, d));
}

// asked_for: a row of kAskedFor, taken where it is possible; or null.
inline Plan plan(const Workload& w, const Device& d, const PlanRow* asked_for = nullptr) {
  const PlanRow* row = kPlanRows;
  if (asked_for && is_possible(asked_for->strategy, w, d))
    row = asked_for;
  else
    while (!row->applies(w, d)) ++row;
  return {row, row->strategy == Strategy::kSkewed ? std::max<int64_t>(skewed_group_samples(w, d), 1) : 0};
}

}  // namespace cbam_fused
