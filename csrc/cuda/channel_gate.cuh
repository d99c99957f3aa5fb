// The channel gate: Mc = sigmoid(W2 sum_b relu(W1 d_b + b1) + B b2), d_b the descriptors of branch b.
// Pools of pixels [N, parts, C] -> descriptors [N, P, C], pixel ties [N, C]; hidden [N, B, R]; Mc [N, C].
// Nothing of x's size is read.
//
// hidden: a block per range of rows of W1 and group of samples, which share what it reads of it. channel_gate:
// likewise, rows of W2. Without W1 there is one layer, W2 [C, C], and channel_gate alone. The kernel that comes first
// turns pools into descriptors, each block those that it needs; the first block of a group of samples stores them.
#pragma once

#include "gate.h"
#include "launch.h"
#include "linear.h"
#include "pools.h"

namespace cbam_fused {

// The descriptors of all samples, from their pools, as inputs of the first layer.
template <class A>
struct Descriptors {
  PartialPools<A> pools;  // [N, parts, C]
  A* descriptors;         // [N, P, C], out; or null
  int32_t* pixel_ties;    // [N, C], out; or null
  Pool pool;
  Ties ties;
  int64_t samples, channels, pixels;
  int columns;  // of inputs a sample has: its branches, or without a hidden layer one, their sum

  int64_t sample_groups() const { return ceil_div(samples, kInputColumns / columns); }

  // The pools of a channel, whatever they are.
  __device__ Pools<A> total(int64_t sample, int64_t channel) const {
    const auto with_ties = [&](auto all) {
      constexpr bool kAll = decltype(all)::value;
      if (ties == Ties::kFirst) return pools.template total<Ties::kFirst, kAll>(sample, channel);
      if (ties == Ties::kEven) return pools.template total<Ties::kEven, kAll>(sample, channel);
      return pools.template total<Ties::kNone, kAll>(sample, channel);
    };
    return pools.squares ? with_ties(std::true_type()) : with_ties(std::false_type());
  }

  // Loads inputs of a group of samples (see linear_layer). keep: descriptors and ties are stored too.
  __device__ void load_inputs(int64_t sample_group, bool keep, int64_t first, int count, A* target) const {
    const int group_samples = kInputColumns / columns;
    for (int i = int(threadIdx.x); i < group_samples * count; i += kLinearThreads) {
      const int64_t sample = sample_group * group_samples + i / count, channel = first + i % count;
      if (sample >= samples) break;
      load_inputs_of(sample, channel, keep, target + i / count * columns * kInputChunk + i % count);
    }
  }

 private:
  __device__ void load_inputs_of(int64_t sample, int64_t channel, bool keep, A* target) const {
    const Pools<A> all = total(sample, channel);
    const A average = all.sum / A(pixels), maximum = all.best.value;
    A* kept = keep && descriptors ? descriptors + sample * pool.count() * channels + channel : nullptr;
    A* input = target;
    A sum = 0;
    const auto pooled = [&](A value) {
      if (kept) store(kept, value);
      if (kept) kept += channels;
      if (columns == pool.count()) *input = value;
      input += kInputChunk;
      sum += value;
    };
    if (pool.avg) pooled(average);
    if (pool.max) pooled(maximum);
    if (pool.lp) pooled(std::sqrt(all.squares));
    if (pool.lse) pooled(maximum - maximum == A(0) ? maximum + std::log(all.exponentials) : A(NAN));
    if (columns != pool.count()) *target = pool.light ? A(0.5) * average + A(0.5) * maximum : sum;
    // No index was kept where all is -inf.
    if (keep && pixel_ties)
      store(pixel_ties + sample * channels + channel, all.best.tie == kNoIndex ? 0 : all.best.tie);
  }
};

// ---- Kernels --------------------------------------------------------------------------------------------------------

template <class W>
__global__ void __launch_bounds__(kLinearThreads) hidden_kernel(Descriptors<Compute<W>> descriptors,
                                                                LinearLayer<W> layer,  // W1 [R, C]
                                                                Compute<W>* hidden) {  // [N, B, R], out
  using A = Compute<W>;
  SHARED_ARRAY(A, room, kInputColumns * kInputChunk);
  const int64_t groups = ceil_div(descriptors.samples, kInputColumns / descriptors.columns);
  const int64_t block = blockIdx.x / groups, group = blockIdx.x % groups;
  const int branches = descriptors.columns, group_columns = kInputColumns / branches * branches;
  linear_layer(
      layer, block, room,
      [&](int64_t first, int count, A* target) { descriptors.load_inputs(group, block == 0, first, count, target); },
      [&](int64_t unit, int column, A product) {
        const int64_t row = group * group_columns + column;  // of [N * B]
        if (column >= group_columns || row >= descriptors.samples * branches) return;
        if (layer.bias) product += to_compute(load(layer.bias + unit));
        store(hidden + row * layer.outputs + unit, product <= A(0) ? A(0) : product);
      });
}

template <class W>
__global__ void __launch_bounds__(kLinearThreads) channel_gate_kernel(Descriptors<Compute<W>> descriptors,
                                                                      LinearLayer<W> layer,      // W2 [C, R], or [C, C]
                                                                      const Compute<W>* hidden,  // [N, B, R] or null
                                                                      Compute<W>* channel_gate) {  // [N, C], out
  using A = Compute<W>;
  SHARED_ARRAY(A, room, kInputColumns * kInputChunk);
  const int64_t samples = descriptors.samples, groups = ceil_div(samples, kInputColumns);
  const int64_t block = blockIdx.x / groups, group = blockIdx.x % groups;
  const int branches = int(descriptors.pool.branches());
  linear_layer(
      layer, block, room,
      [&](int64_t first, int count, A* target) {
        if (!hidden) return descriptors.load_inputs(group, block == 0, first, count, target);
        for (int i = int(threadIdx.x); i < kInputColumns * count; i += kLinearThreads) {
          const int64_t sample = group * kInputColumns + i / count;
          if (sample >= samples) break;
          A sum = 0;
          for (int branch = 0; branch < branches; ++branch)
            sum += load(hidden + (sample * branches + branch) * layer.inputs + first + i % count);
          target[i / count * kInputChunk + i % count] = sum;
        }
      },
      [&](int64_t channel, int column, A product) {
        const int64_t sample = group * kInputColumns + column;
        if (sample >= samples) return;
        if (layer.bias) product += A(branches) * to_compute(load(layer.bias + channel));
        store(channel_gate + sample * layer.outputs + channel, sigmoid(product));
      });
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

template <class W>
struct Mlp {
  const W* weight1;  // [R, C] or null
  const W* bias1;    // [R] or null
  const W* weight2;  // [C, R], or [C, C] without weight1
  const W* bias2;    // [C] or null
  int64_t reduced;   // R
};

// hidden: scratch or a result, null without weight1.
template <class W>
void channel_gate_launch(const Stream& stream, Descriptors<Compute<W>> descriptors, const Mlp<W>& mlp,
                         Compute<W>* hidden,          // [N, B, R], out
                         Compute<W>* channel_gate) {  // [N, C], out
  const int64_t channels = descriptors.channels;
  descriptors.columns = mlp.weight1 ? int(descriptors.pool.branches()) : 1;
  if (mlp.weight1) {
    const LinearLayer<W> layer(mlp.weight1, mlp.bias1, mlp.reduced, channels);
    launch(stream, "hidden", hidden_kernel<W>, {layer.blocks() * descriptors.sample_groups(), kLinearThreads},
           descriptors, layer, hidden);
  }
  const LinearLayer<W> layer(mlp.weight2, mlp.bias2, channels, mlp.weight1 ? mlp.reduced : channels);
  launch(stream, "channel_gate", channel_gate_kernel<W>,
         {layer.blocks() * ceil_div(descriptors.samples, kInputColumns), kLinearThreads}, descriptors, layer,
         mlp.weight1 ? hidden : nullptr, channel_gate);
}

}  // namespace cbam_fused
