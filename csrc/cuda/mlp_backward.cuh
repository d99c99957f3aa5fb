// The backward of the channel gate's MLP, and all parameter gradients. With dMc [N, C] the gradient of the channel
// gate, B branches and dg = dMc Mc (1 - Mc):
//   total_grad = dg W2                        the gradient of the sum of the branches' hidden units
//   hidden_grad[b] = total_grad where hidden[b] > 0, else 0
//   branches_grad[b] = hidden_grad[b] W1
//   dW2 = dg^T sum_b hidden[b],   db2 = B sum_n dg
//   dW1 = sum_b hidden_grad[b]^T branch[b],   db1 = sum_n,b hidden_grad[b]
// Without a first layer total_grad is the gradient of every branch, and dW2 = dg^T sum_b branch[b]. A branch is one
// descriptor, or 0.5 avg + 0.5 max for the light pool.
// Traffic: no x-sized tensor.
//
// gate_backward: a block has some samples, some hundred channels and some columns of W2, and leaves a part of
// total_grad. parameter_gradients: a block makes a tile of one of the results, samples in ascending order.
#pragma once

#include "tile.h"

namespace cbam_fused {

constexpr int kGateSamples = 4;     // of a block of gate_backward: they share what is read of W2
constexpr int kGateChannels = 256;  // of the same
constexpr int kGateColumns = 128;   // of W2, at most

template <class W>
struct MlpBackward {
  using A = Compute<W>;

  int64_t samples;
  int channels, width;  // width: hidden units, or channels without a first layer
  int branches;         // inputs of the MLP
  bool light;
  int pixel_tiles;  // parts of what reaches a channel's gate through the maps

  const A* channel_sums;   // [N, C]: dMc but for the maps
  const A* channel_parts;  // [N, pixel tiles, C], or null without a spatial gate
  const A* channel_gate;   // [N, C]
  const A* descriptors;    // [N, P, C]
  const A* hidden;         // [N, B, R]
  const W* weight1;        // [R, C], or null without a first layer, as its gradients
  const W* weight2;        // [C, width]

  A* gate_logits_grad;  // [N, C], scratch: dg
  A* total_grad_parts;  // [N, splits, width], scratch
  A* branches_grad;     // [N, B, C], out; without a first layer [N, 1, C], for every branch
  W* weight1_grad;      // [R, C], out, as the next
  W* bias1_grad;        // [R]
  W* weight2_grad;      // [C, width], out, as the next
  W* bias2_grad;        // [C]

  int taps;                    // of the convolution; 0 without a spatial gate, and then none of the following
  int64_t parts;               // of each of its gradients
  const A* convolution_parts;  // [taps + 1, parts]: of the weights, and of the bias
  A* convolution_weight_grad;  // [taps], out
  A* convolution_bias_grad;    // [1], out

  __host__ __device__ int splits() const { return int(ceil_div(channels, kGateChannels)); }
  __host__ __device__ int column_blocks() const { return int(ceil_div(width, kGateColumns)); }

  __device__ A total_grad(int64_t n, int column) const {
    return sum_partials(total_grad_parts + n * splits() * width + column, splits(), width);
  }
  // Vectors are the branches of the samples: n * B + b.
  __device__ A hidden_grad(int64_t vector, int unit) const {
    return load(hidden + vector * width + unit) <= A(0) ? A(0) : total_grad(vector / branches, unit);
  }
  __device__ A branch(int64_t vector, int channel) const {
    if (!light) return load(descriptors + vector * channels + channel);
    const A* pair = descriptors + vector * 2 * channels + channel;
    return A(0.5) * load(pair) + A(0.5) * load(pair + channels);
  }
};

template <class W>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) gate_backward_kernel(MlpBackward<W> p) {
  using A = Compute<W>;
  SHARED_ARRAY(A, grad, kGateSamples * kGateChannels);
  SHARED_ARRAY(A, room, kGateSamples * kTileThreads);
  const unsigned block = blockIdx.x, column_blocks = unsigned(p.column_blocks()), splits = unsigned(p.splits());
  const int first_column = int(block % column_blocks) * kGateColumns;
  const int split = int(block / column_blocks % splits), first_channel = split * kGateChannels;
  const int64_t first_sample = int64_t(block / column_blocks / splits) * kGateSamples;
  const int channels = p.channels - first_channel < kGateChannels ? p.channels - first_channel : kGateChannels;
  const int columns = p.width - first_column < kGateColumns ? p.width - first_column : kGateColumns;
  const int samples = int(p.samples - first_sample < kGateSamples ? p.samples - first_sample : kGateSamples);
  const int thread = int(threadIdx.x);

  for (int i = thread; i < kGateSamples * kGateChannels; i += kTileThreads) {
    const int sample = i / kGateChannels, channel = i % kGateChannels;
    A value = 0;
    if (sample < samples && channel < channels) {
      const int64_t n = first_sample + sample, at = n * p.channels + first_channel + channel;
      value = load(p.channel_sums + at);
      if (p.channel_parts) {
        const A* parts = p.channel_parts + n * p.pixel_tiles * p.channels + first_channel + channel;
        value += sum_partials(parts, p.pixel_tiles, p.channels);
      }
      const A gate = load(p.channel_gate + at);
      value *= gate * (A(1) - gate);
      if (first_column == 0) store(p.gate_logits_grad + at, value);
    }
    grad[i] = value;
  }
  __syncthreads();

  // Neighbouring threads have neighbouring columns; where there are few columns, threads share one, channel by channel.
  int lanes = 1;
  while (lanes < columns) lanes *= 2;
  const int lane = thread % lanes, lines = kTileThreads / lanes;
  A sums[kGateSamples] = {};
  if (lane < columns) {
    const W* weight = p.weight2 + int64_t(first_channel) * p.width + first_column + lane;
#pragma unroll 4
    for (int channel = thread / lanes; channel < channels; channel += lines) {
      const A value = to_compute(load(weight + int64_t(channel) * p.width));
#pragma unroll
      for (int sample = 0; sample < kGateSamples; ++sample)
        sums[sample] = std::fma(grad[sample * kGateChannels + channel], value, sums[sample]);
    }
  }
#pragma unroll
  for (int sample = 0; sample < kGateSamples; ++sample) room[sample * kTileThreads + thread] = sums[sample];
  __syncthreads();
  for (int i = thread; i < samples * columns; i += kTileThreads) {
    const int sample = i / columns, column = i % columns;
    store(p.total_grad_parts + ((first_sample + sample) * splits + split) * p.width + first_column + column,
          sum_chains(room + sample * kTileThreads + column, lines, lanes));
  }
}

// ---- Parameter gradients --------------------------------------------------------------------------------------------

constexpr int kOuterRows = 16, kOuterColumns = 64;  // of a weight's gradient that a block makes
constexpr int kOuterVectors = 16;                   // added up at a time
constexpr int kBranchVectors = 8;                   // of a block of branches_grad: they share what is read of W1
constexpr int kBranchUnits = 32;                    // at a time

inline int64_t outer_blocks(int64_t rows, int64_t columns) {
  return ceil_div(rows, kOuterRows) * ceil_div(columns, kOuterColumns);
}

// Tile `block` of sum_v row_value(v, row) column_value(v, column) -> weight_grad [rows, columns], and of bias_factor *
// sum_v row_value(v, row) -> bias_grad [rows]. `room` is kOuterVectors * (kOuterRows + kOuterColumns) numbers.
template <class W, class R, class C>
__device__ inline void outer_products(int block, int64_t vectors, int rows, int columns, R row_value, C column_value,
                                      W* weight_grad, W* bias_grad, Compute<W> bias_factor, Compute<W>* room) {
  using A = Compute<W>;
  constexpr int kRows = kOuterRows * kOuterColumns / kTileThreads;  // of a thread
  A* const row_values = room;                                       // [kOuterVectors, kOuterRows]
  A* const column_values = room + kOuterVectors * kOuterRows;       // [kOuterVectors, kOuterColumns]
  const int column_blocks = int(ceil_div(columns, kOuterColumns));
  const int first_row = block / column_blocks * kOuterRows, first_column = block % column_blocks * kOuterColumns;
  const int thread = int(threadIdx.x), column = thread % kOuterColumns, row = thread / kOuterColumns * kRows;
  A sums[kRows] = {}, bias_sum = 0;
  for (int64_t first = 0; first < vectors; first += kOuterVectors) {
    __syncthreads();
    for (int i = thread; i < kOuterVectors * kOuterRows; i += kTileThreads) {
      const int64_t v = first + i / kOuterRows;
      const int r = first_row + i % kOuterRows;
      row_values[i] = v < vectors && r < rows ? row_value(v, r) : A(0);
    }
    for (int i = thread; i < kOuterVectors * kOuterColumns; i += kTileThreads) {
      const int64_t v = first + i / kOuterColumns;
      const int c = first_column + i % kOuterColumns;
      column_values[i] = v < vectors && c < columns ? column_value(v, c) : A(0);
    }
    __syncthreads();
    A chains[kRows] = {};
#pragma unroll 4
    for (int v = 0; v < kOuterVectors; ++v) {
      const A value = column_values[v * kOuterColumns + column];
#pragma unroll
      for (int r = 0; r < kRows; ++r) chains[r] = std::fma(row_values[v * kOuterRows + row + r], value, chains[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] += chains[r];
    if (thread < kOuterRows) bias_sum += sum_chains(row_values + thread, kOuterVectors, kOuterRows);
  }
  if (first_column + column < columns)
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (first_row + row + r < rows)
        store(weight_grad + int64_t(first_row + row + r) * columns + first_column + column, rounded<W>(sums[r]));
  if (first_column == 0 && thread < kOuterRows && first_row + thread < rows)
    store(bias_grad + first_row + thread, rounded<W>(bias_factor * bias_sum));
}

// Block `block` of branches_grad: kBranchVectors vectors, a channel per thread. `room`: kBranchVectors * kBranchUnits.
template <class W>
__device__ inline void branch_gradients(int64_t block, const MlpBackward<W>& p, Compute<W>* room) {
  using A = Compute<W>;
  const int channel_blocks = int(ceil_div(p.channels, kTileThreads)), thread = int(threadIdx.x);
  const int channel = int(block % channel_blocks) * kTileThreads + thread;
  const int64_t first = block / channel_blocks * kBranchVectors, vectors = p.samples * p.branches;
  A sums[kBranchVectors] = {};
  for (int first_unit = 0; first_unit < p.width; first_unit += kBranchUnits) {
    const int units = p.width - first_unit < kBranchUnits ? p.width - first_unit : kBranchUnits;
    __syncthreads();
    for (int i = thread; i < kBranchVectors * kBranchUnits; i += kTileThreads) {
      const int64_t v = first + i / kBranchUnits;
      const int unit = i % kBranchUnits;
      room[i] = v < vectors && unit < units ? p.hidden_grad(v, first_unit + unit) : A(0);
    }
    __syncthreads();
    if (channel >= p.channels) continue;
    A chains[kBranchVectors] = {};
#pragma unroll 4
    for (int unit = 0; unit < units; ++unit) {
      const A weight = to_compute(load(p.weight1 + int64_t(first_unit + unit) * p.channels + channel));
#pragma unroll
      for (int v = 0; v < kBranchVectors; ++v) chains[v] = std::fma(room[v * kBranchUnits + unit], weight, chains[v]);
    }
#pragma unroll
    for (int v = 0; v < kBranchVectors; ++v) sums[v] += chains[v];
  }
  if (channel >= p.channels) return;
#pragma unroll
  for (int v = 0; v < kBranchVectors; ++v)
    if (first + v < vectors) store(p.branches_grad + (first + v) * p.channels + channel, sums[v]);
}

// How many blocks make which result: dW2, dW1, branches_grad, then one per tap of the convolution and its bias.
struct ParameterBlocks {
  int weight2, weight1, branches, convolution;

  int64_t total() const { return int64_t(weight2) + weight1 + branches + convolution; }
};

template <class W>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    parameter_gradients_kernel(MlpBackward<W> p, ParameterBlocks blocks) {
  using A = Compute<W>;
  SHARED_ARRAY(A, room, kOuterVectors * (kOuterRows + kOuterColumns));
  int block = int(blockIdx.x);
  const int64_t vectors = p.samples * p.branches;
  if (block < blocks.weight2) {
    const auto inputs = [&](int64_t n, int column) {
      A total = 0;
      for (int64_t v = n * p.branches; v < (n + 1) * p.branches; ++v)
        total += p.weight1 ? load(p.hidden + v * p.width + column) : p.branch(v, column);
      return total;
    };
    const auto grads = [&](int64_t n, int channel) { return load(p.gate_logits_grad + n * p.channels + channel); };
    outer_products(block, p.samples, p.channels, p.width, grads, inputs, p.weight2_grad, p.bias2_grad, A(p.branches),
                   room);
    return;
  }
  block -= blocks.weight2;
  if (block < blocks.weight1) {
    const auto inputs = [&](int64_t v, int channel) { return p.branch(v, channel); };
    const auto grads = [&](int64_t v, int unit) { return p.hidden_grad(v, unit); };
    outer_products(block, vectors, p.width, p.channels, grads, inputs, p.weight1_grad, p.bias1_grad, A(1), room);
    return;
  }
  block -= blocks.weight1;
  if (block < blocks.branches) {
    if (p.weight1) {
      branch_gradients(block, p, room);
      return;
    }
    const int64_t i = int64_t(block) * kTileThreads + threadIdx.x;
    if (i < p.samples * p.channels) store(p.branches_grad + i, p.total_grad(i / p.channels, int(i % p.channels)));
    return;
  }
  const int tap = block - blocks.branches;
  const int64_t thread = threadIdx.x, parts = p.parts;
  const int64_t own = thread < parts ? ceil_div(parts - thread, kTileThreads) : 0;
  const A sum = block_sum(sum_partials(p.convolution_parts + tap * parts + thread, own, kTileThreads), room);
  if (thread == 0) store(tap < p.taps ? p.convolution_weight_grad + tap : p.convolution_bias_grad, sum);
}

// Numbers of scratch: gate_logits_grad and total_grad_parts.
struct MlpBackwardScratch {
  int64_t gate_logits_grad, total_grad_parts;
};

template <class W>
MlpBackwardScratch mlp_backward_scratch(const MlpBackward<W>& p) {
  return {p.samples * p.channels, p.samples * p.splits() * p.width};
}

template <class W>
void mlp_backward_launch(const Stream& stream, const MlpBackward<W>& p) {
  const int64_t groups = ceil_div(p.samples, kGateSamples);
  launch(stream, "gate_backward", gate_backward_kernel<W>, {groups * p.splits() * p.column_blocks(), kTileThreads}, p);
  const int64_t channel_blocks = ceil_div(p.channels, kTileThreads);
  ParameterBlocks blocks = {};
  blocks.weight2 = int(outer_blocks(p.channels, p.width));
  if (p.weight1) {
    blocks.weight1 = int(outer_blocks(p.width, p.channels));
    blocks.branches = int(ceil_div(p.samples * p.branches, kBranchVectors) * channel_blocks);
  } else {
    blocks.branches = int(ceil_div(p.samples * p.channels, kTileThreads));
  }
  if (p.taps > 0) blocks.convolution = p.taps + 1;
  launch(stream, "parameter_gradients", parameter_gradients_kernel<W>, {blocks.total(), kTileThreads}, p, blocks);
}

}  // namespace cbam_fused
