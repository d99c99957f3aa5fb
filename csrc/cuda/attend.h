// Host side of phase 1, which cbam_attend and cbam_inference share: the channel gate, and x * Mc pooled over channels.
#pragma once

#include "aligned.h"
#include "channel_gate.cuh"
#include "convolution.h"
#include "operation.h"
#include "pooling.cuh"

namespace cbam_fused {

// PartialPools with the tensor they are in.
template <class A>
struct PoolsTensor {
  Tensor scratch;
  PartialPools<A> pools;

  PoolsTensor(const Operation& operation, const char* name, int64_t samples, int64_t parts, int64_t length, bool all,
              bool ties)
      : scratch(operation.new_compute<A>(name, {partial_pools_scratch<A>(samples, parts, length, all, ties)})),
        pools(partial_pools(mutable_data<A>(scratch), samples, parts, length, all, ties)) {}
};

// The MLP's parameters, dense.
struct MlpTensors {
  OptionalTensor weight1, bias1;
  Tensor weight2;
  OptionalTensor bias2;

  MlpTensors(const OptionalTensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
             const OptionalTensor& bias2)
      : weight1(row_major(weight1)), bias1(row_major(bias1)), weight2(row_major(weight2)), bias2(row_major(bias2)) {}

  int64_t reduced() const { return weight1 ? weight1->size(0) : 0; }

  template <class W>
  Mlp<W> pointers(const Operation& operation) const {
    return {operation.input<W>("mlp_weight1", weight1), operation.input<W>("mlp_bias1", bias1),
            operation.input<W>("mlp_weight2", weight2), operation.input<W>("mlp_bias2", bias2), reduced()};
  }
};

// Where the results of phase 1 go; what is null is not kept.
template <class A>
struct ChannelResults {
  A* descriptors;       // [N, P, C] or null
  int32_t* pixel_ties;  // [N, C] or null
  A* hidden;            // [N, B, R]
  A* channel_gate;      // [N, C]
};

// The channel gate of x, dense.
template <Ties ties, class T>
void attend_channels(const Operation& operation, const Tensor& x, const MlpTensors& mlp, const Pool& pool,
                     const ChannelResults<Compute<T>>& results) {
  using A = Compute<T>;
  const Shape s = shape_of(x);
  const PoolsTensor<A> pooled(operation, "pixel_pools", s.n, pixel_parts<T>(s), s.c, pool.lp || pool.lse,
                              ties != Ties::kNone);
  pool_pixels_launch<ties>(operation.stream(), s, data<T>(x), pooled.pools);
  const Descriptors<A> descriptors = {
      pooled.pools, results.descriptors, results.pixel_ties, pool, ties, s.n, s.c, s.pixels(), 0};
  // Weights are in the compute type or in that of x.
  const auto launch = [&](auto weight) {
    using W = decltype(weight);
    channel_gate_launch(operation.stream(), descriptors, mlp.pointers<W>(operation), results.hidden,
                        results.channel_gate);
  };
  if (mlp.weight2.scalar_type() == compute_dtype<A>())
    launch(A());
  else
    launch(T());
}

// x * Mc pooled over channels, as what the convolution of the spatial gate reads.
template <Ties ties, class T>
Convolution<Compute<T>, ties> attend_pixels(const Operation& operation, const Tensor& x, const Compute<T>* channel_gate,
                                            const PoolsTensor<Compute<T>>& pooled, const Tensor& conv_weight,
                                            const OptionalTensor& conv_bias, const Maps& maps) {
  using A = Compute<T>;
  const Shape s = shape_of(x);
  pool_channels_launch<ties>(operation.stream(), s, data<T>(x), channel_gate, pooled.pools);
  Convolution<A, ties> convolution = {};
  convolution.pools = pooled.pools;
  convolution.weight = operation.parameter<A>("conv_weight", conv_weight);
  convolution.bias = operation.parameter<A>("conv_bias", conv_bias);
  convolution.maps = maps;
  convolution.channels = s.c;
  convolution.height = int(s.h);
  convolution.width = int(s.w);
  convolution.kernel_size = int(conv_weight.size(3));
  return convolution;
}

}  // namespace cbam_fused
