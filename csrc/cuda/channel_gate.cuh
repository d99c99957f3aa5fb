// The channel gate: Mc = sigmoid(W2 sum_b relu(W1 d_b + b1) + B b2), d_b the descriptors of branch b.
// Pools of pixels [N, parts, C] -> descriptors [N, P, C], pixel ties [N, C]; hidden [N, B, R]; Mc [N, C].
// Nothing of x's size is read.
//
// hidden: a block per range of rows of W1 and group of samples, which share what it reads of it. channel_gate:
// likewise, rows of W2. Without W1 there is one layer, W2 [C, C], and channel_gate alone. The kernel that comes first
// turns pools into descriptors, each block those that it needs; the first block of a group of samples stores them.
//
// channel_gate_in_block: of one sample, by one block, for kernels that go on with it.
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
      load_input(sample, channel, keep, target + i / count * columns * kInputChunk + i % count, kInputChunk);
    }
  }

  // Loads the inputs of a channel, one for each column, `apart` in target.
  __device__ void load_input(int64_t sample, int64_t channel, bool keep, A* target, int apart) const {
    set_input(total(sample, channel), sample, channel, keep, target, apart);
  }
  // The same from the channel's pools.
  __device__ void set_input(const Pools<A>& all, int64_t sample, int64_t channel, bool keep, A* target,
                            int apart) const {
    const A average = all.sum / A(pixels), maximum = all.best.value;
    A* kept = keep && descriptors ? descriptors + sample * pool.count() * channels + channel : nullptr;
    A* input = target;
    A sum = 0;
    const auto pooled = [&](A value) {
      if (kept) store(kept, value);
      if (kept) kept += channels;
      if (columns == pool.count()) *input = value;
      input += apart;
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

// A layer's value from its product: relu(product + b1), and sigmoid(product + B b2) of the sum over B branches.
template <class W, class A = Compute<W>>
__device__ inline A hidden_unit(const LinearLayer<W>& layer, int64_t unit, A product) {
  if (layer.bias) product += to_compute(load(layer.bias + unit));
  return product <= A(0) ? A(0) : product;
}
template <class W, class A = Compute<W>>
__device__ inline A gate_of_channel(const LinearLayer<W>& layer, int64_t channel, int branches, A product) {
  if (layer.bias) product += A(branches) * to_compute(load(layer.bias + channel));
  return sigmoid(product);
}

// ---- In a block -----------------------------------------------------------------------------------------------------

template <class W>
struct Mlp {
  const W* weight1;  // [R, C] or null
  const W* bias1;    // [R] or null
  const W* weight2;  // [C, R], or [C, C] without weight1
  const W* bias2;    // [C] or null
  int64_t reduced;   // R
};

// An MLP whose parameters are in the compute type or, all of them, in T.
template <class T>
struct EitherMlp {
  using A = Compute<T>;

  Mlp<A> in_compute;
  Mlp<T> in_x_dtype;  // if there is no in_compute.weight2
  int64_t reduced;    // R
  int64_t weight_bytes;

  // Calls f with the MLP.
#pragma nv_exec_check_disable
  template <class F>
  __host__ __device__ void visit(F f) const {
    if constexpr (std::is_same_v<T, A>) {
      f(in_compute);
    } else {
      if (in_compute.weight2)
        f(in_compute);
      else
        f(in_x_dtype);
    }
  }
};

// Shared memory of channel_gate_in_block: the inputs of both layers, rounded up to vectors, and the gate.
struct GateRoom {
  int channels, reduced, columns;  // columns: branches

  __host__ __device__ static int rounded_up(int64_t count) { return int((count + 7) / 8 * 8); }
  __host__ __device__ int inputs() const { return rounded_up(channels); }
  __host__ __device__ int hidden() const { return rounded_up(reduced); }
  // The gate takes the place of the inputs, which are read no more.
  __host__ __device__ int64_t size() const { return int64_t(columns) * (inputs() + hidden()) + hidden(); }
};

// The gate of one sample, by all threads of a block: it is left, [C], at the start of `room`, which has GateRoom's
// size. There must be a hidden layer. keep: descriptors, ties, hidden [N, B, R] and the gate [N, C] are stored.
template <class W>
__device__ inline void channel_gate_in_block(const Descriptors<Compute<W>>& descriptors, const Mlp<W>& mlp,
                                             int64_t sample, bool keep, Compute<W>* hidden, Compute<W>* channel_gate,
                                             Compute<W>* room) {
  using A = Compute<W>;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), columns = descriptors.columns;
  const int channels = int(descriptors.channels), reduced = int(mlp.reduced);
  const GateRoom sizes = {channels, reduced, columns};
  A* const inputs = room;                                          // [B, C]
  A* const branch_hidden = inputs + columns * sizes.inputs();      // [B, R]
  A* const sum_hidden = branch_hidden + columns * sizes.hidden();  // [R]
  for (int channel = thread; channel < sizes.inputs(); channel += threads) {
    if (channel < channels)
      descriptors.load_input(sample, channel, keep, inputs + channel, sizes.inputs());
    else
      for (int column = 0; column < columns; ++column) inputs[column * sizes.inputs() + channel] = A(0);
  }
  __syncthreads();
  const LinearLayer<W> first(mlp.weight1, mlp.bias1, reduced, channels);
  linear_layer_in_block(first, 0, reduced, columns, inputs, sizes.inputs(), [&](int64_t unit, int column, A product) {
    const A value = hidden_unit(first, unit, product);
    branch_hidden[column * sizes.hidden() + unit] = value;
    if (keep) store(hidden + (sample * columns + column) * reduced + unit, value);
  });
  __syncthreads();
  for (int unit = thread; unit < sizes.hidden(); unit += threads) {
    A sum = 0;
    for (int column = 0; unit < reduced && column < columns; ++column)
      sum += branch_hidden[column * sizes.hidden() + unit];
    sum_hidden[unit] = sum;
  }
  __syncthreads();
  A* const gate = inputs;
  const LinearLayer<W> second(mlp.weight2, mlp.bias2, channels, reduced);
  linear_layer_in_block(second, 0, channels, 1, sum_hidden, sizes.hidden(), [&](int64_t channel, int, A product) {
    const A value = gate_of_channel(second, channel, columns, product);
    gate[channel] = value;
    if (keep) store(channel_gate + sample * channels + channel, value);
  });
  __syncthreads();
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

// hidden: scratch or a result, null without weight1.
template <class W>
void channel_gate_launch(const Stream& stream, const Descriptors<Compute<W>>& descriptors, const Mlp<W>& mlp,
                         Compute<W>* hidden,         // [N, B, R], out
                         Compute<W>* channel_gate);  // [N, C], out

}  // namespace cbam_fused
