// Host side of what cbam_attend and cbam_inference share: the channel gate, x * Mc pooled over channels, y.
#pragma once

#include "aligned.h"
#include "channel_gate.cuh"
#include "convolution.h"
#include "operation.h"
#include "pooling.cuh"
#include "resident.cuh"
#include "skewed.cuh"

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

  template <class T>
  EitherMlp<T> pointers(const Operation& operation) const {
    using A = Compute<T>;
    EitherMlp<T> mlp = {};
    if (weight2.scalar_type() == compute_dtype<A>())
      mlp.in_compute = parameters<A>(operation);
    else
      mlp.in_x_dtype = parameters<T>(operation);
    mlp.reduced = reduced();
    mlp.weight_bytes = (weight2.numel() + (weight1 ? weight1->numel() : 0)) * weight2.element_size();
    return mlp;
  }

 private:
  template <class W>
  Mlp<W> parameters(const Operation& operation) const {
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

// The convolution of the spatial gate, on pools over channels that are still to be filled.
template <class A, Ties ties>
Convolution<A, ties> convolution_of(const Operation& operation, const Shape& s, const PoolsTensor<A>& pooled,
                                    const Tensor& conv_weight, const OptionalTensor& conv_bias, const Maps& maps) {
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

// The channel gate of x, dense; with channel_pools x * Mc pooled over channels, into them; with kApply y.
template <Ties ties, bool kApply, class T>
void attend(const Operation& operation, const Tensor& x, const MlpTensors& mlp, const Pool& pool,
            const ChannelResults<Compute<T>>& results, const PoolsTensor<Compute<T>>* channel_pools,
            Apply<T> apply = {}) {
  using A = Compute<T>;
  const Stream& stream = operation.stream();
  const Shape s = shape_of(x);
  const EitherMlp<T> weights = mlp.pointers<T>(operation);
  const bool all_pools = pool.lp || pool.lse, has_ties = ties != Ties::kNone;
  const int branches = mlp.weight1 ? int(pool.branches()) : 1;
  Descriptors<A> descriptors = {{},      results.descriptors, results.pixel_ties, pool, ties, s.n, s.c, s.pixels(),
                                branches};

  Resident<T> resident = {};
  int64_t resident_bytes = 0;
  if constexpr (kApply) {
    resident.apply = apply;
    resident.descriptors = descriptors;
    resident.mlp = weights;
    if (set_resident(resident, s)) resident_bytes = ResidentRoom(resident, s.channels_last).template bytes<T>();
  }
  const int64_t scratch = partial_pools_scratch<A>(s.n, pixel_parts<T>(s), s.c, all_pools, has_ties) +
                          (channel_pools ? channel_pools->scratch.numel() : 0);
  const Workload workload = {
      s,
      s.sample() * int64_t(sizeof(T)),
      scratch * int64_t(sizeof(A)) / std::max<int64_t>(s.n, 1),
      weights.weight_bytes,
      kApply,
      kApply && apply.residual,
      has_skewed_kernel<T>(s, pool, ties, bool(mlp.weight1), channel_pools != nullptr, mlp.reduced()),
      resident.blocks,
      resident_bytes};
  const Plan plan = operation.plan(workload, [&] {
    if constexpr (kApply && sizeof(T) <= 4) return resident_fits(stream, resident, s);
    return false;
  });
  if constexpr (kApply && sizeof(T) <= 4)
    if (plan.row->strategy == Strategy::kResident) return resident_launch(stream, resident, s);

  const PoolsTensor<A> pixel_pools(operation, "pixel_pools", s.n, pixel_parts<T>(s), s.c, all_pools, has_ties);
  descriptors.pools = pixel_pools.pools;
  if constexpr (sizeof(T) <= 4 && ties != Ties::kEven) {
    if (plan.row->strategy == Strategy::kSkewed) {
      const auto walk = [&](const auto& pool_pixels, const auto& pool_channels, auto channels_last) {
        apply.tile(s);
        Skewed<T, decltype(channels_last)::value> p = {};
        p.descriptors = descriptors;
        p.mlp = weights;
        p.hidden = results.hidden;
        p.channel_gate = results.channel_gate;
        p.pool_pixels = pool_pixels;
        p.pool_channels = pool_channels;
        p.apply = apply;
        skewed_launch<ties, kApply>(stream, p, s.n, plan.group_samples);
      };
      const T* const values = data<T>(x);
      if (s.channels_last)
        walk(pixel_columns(s, values, pixel_pools.pools), channel_rows(s, values, channel_pools->pools),
             std::true_type());
      else
        walk(pixel_rows(s, values, pixel_pools.pools), channel_columns(s, values, channel_pools->pools),
             std::false_type());
      return;
    }
  }

  pool_pixels_launch<ties>(stream, s, data<T>(x), pixel_pools.pools);
  weights.visit(
      [&](const auto& mlp) { channel_gate_launch(stream, descriptors, mlp, results.hidden, results.channel_gate); });
  if (channel_pools) pool_channels_launch<ties>(stream, s, data<T>(x), results.channel_gate, channel_pools->pools);
  if constexpr (kApply) apply_launch(stream, apply, s);
}

}  // namespace cbam_fused
