// Threads and scratch of the CPU backend.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

namespace cbam_fused::cpu {

template <class A>
std::unique_ptr<A[]> scratch(int64_t count) {
  return std::unique_ptr<A[]>(new A[std::max<int64_t>(count, 1)]);
}

// f(begin, end) over [0, count) on PyTorch's threads, in pieces of at least `grain`.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || torch::stable::get_num_threads() == 1) {
    if (count > 0) f(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// True where the work should be spread within each sample, because whole samples would leave threads idle.
inline bool split_samples(int64_t samples) {
  const int64_t threads = torch::stable::get_num_threads();
  return samples < threads || (samples % threads != 0 && samples < 4 * threads);
}

// f(begin, end, spread) over samples [0, count): on each thread for its own samples, or once for all, to spread the
// work within them.
template <class F>
void for_samples(int64_t count, const F& f) {
  if (split_samples(count))
    f(int64_t(0), count, true);
  else
    parallel(count, 1, [&](int64_t begin, int64_t end) { f(begin, end, false); });
}

// f(begin, end) over [0, count), in pieces of whole blocks that are worth a thread if `spread`, for `work` elements an
// item. Blocks of columns should be whole vectors; a row is a block by itself.
constexpr int64_t kColumnBlock = 64;

template <class F>
void for_blocks(bool spread, int64_t count, int64_t block, int64_t work, const F& f) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (block * std::max<int64_t>(work, 1)));
  if (spread)
    parallel((count + block - 1) / block, grain,
             [&](int64_t begin, int64_t end) { f(begin * block, std::min(end * block, count)); });
  else
    f(int64_t(0), count);
}

}  // namespace cbam_fused::cpu
