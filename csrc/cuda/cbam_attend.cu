// The operation cbam_attend, phase 1 of the gate: Mc, the pooled maps and the logits z, and with batch statistics the
// mean and the variance of z over N H W. Traffic: x twice.
#include "attend.h"
#include "spatial_logits.cuh"

namespace cbam_fused {

using AttendResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AttendResult cbam_attend(Tensor x_in, OptionalTensor mlp_weight1, OptionalTensor mlp_bias1, Tensor mlp_weight2,
                         OptionalTensor mlp_bias2, OptionalTensor conv_weight, OptionalTensor conv_bias,
                         bool batch_statistics, OptionalTensor running_mean, OptionalTensor running_var,
                         double momentum, std::string pool, std::string maps, std::string ties) {
  const Pool pools = parse_pool(pool);
  const Maps map_order = parse_maps(maps);
  const Ties shared = parse_ties(ties);
  const Checks checks("cbam_attend", x_in);
  checks.mlp(mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2);
  checks.convolution(conv_weight, conv_bias, map_order.count);
  checks.running("running_mean", running_mean);
  checks.running("running_var", running_var);
  const Operation operation("cbam_attend", x_in);
  const Tensor x = aligned(dense(x_in));
  const Shape s = shape_of(x);
  const MlpTensors mlp(mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2);
  const OptionalTensor kernel = row_major(conv_weight);
  const bool spatial = kernel.has_value(), statistics = spatial && batch_statistics;
  const auto if_spatial = [&](std::vector<int64_t> sizes) { return spatial ? sizes : std::vector<int64_t>{0}; };

  return dispatch(x.scalar_type(), [&](auto element) -> AttendResult {
    using T = DeviceElement<decltype(element)>;
    using A = Compute<T>;
    operation.input<T>("x", x);
    Tensor gates = operation.new_compute<A>("channel_gate", {s.n, s.c});
    Tensor descriptors = operation.new_compute<A>("descriptors", {s.n, pools.count(), s.c});
    Tensor hidden = operation.new_compute<A>("hidden", {s.n, pools.branches(), mlp.reduced()});
    Tensor pixel_ties = operation.empty(
        "pixel_ties", pools.max ? std::vector<int64_t>{s.n, s.c} : std::vector<int64_t>{0}, ScalarType::Int);
    Tensor pooled = operation.new_compute<A>("pooled", if_spatial({s.n, 2, s.h, s.w}));
    Tensor channel_ties = operation.empty("channel_ties", if_spatial({s.n, s.h, s.w}), ScalarType::Int);
    Tensor logits = operation.new_compute<A>("logits", if_spatial({s.n, s.h, s.w}));
    Tensor mean = operation.new_compute<A>("norm_mean", {statistics});
    Tensor var = operation.new_compute<A>("norm_var", {statistics});
    Tensor deviations = operation.new_compute<A>("deviations", {statistics ? s.n * logits_tiles(s.pixels()) * 2 : 0});

    const auto run = [&](auto ties_constant) {
      constexpr Ties kTies = decltype(ties_constant)::value;
      const ChannelResults<A> results = {mutable_data<A>(descriptors),
                                         pools.max ? mutable_data<int32_t>(pixel_ties) : nullptr,
                                         mutable_data<A>(hidden), mutable_data<A>(gates)};
      if (!spatial) return attend<kTies, false, T>(operation, x, mlp, pools, results, nullptr);
      const PoolsTensor<A> channel_pools(operation, "channel_pools", s.n, channel_parts<T>(s), s.pixels(), false, true);
      attend<kTies, false, T>(operation, x, mlp, pools, results, &channel_pools);
      SpatialLogits<A, kTies> p = {};
      p.convolution = convolution_of<A, kTies>(operation, s, channel_pools, *kernel, conv_bias, map_order);
      p.pooled = mutable_data<A>(pooled);
      p.channel_ties = mutable_data<int32_t>(channel_ties);
      p.logits = mutable_data<A>(logits);
      p.deviations = statistics ? mutable_data<A>(deviations) : nullptr;
      spatial_logits_launch(operation.stream(), p, s.n);
    };
    if (shared == Ties::kFirst)
      run(std::integral_constant<Ties, Ties::kFirst>());
    else
      run(std::integral_constant<Ties, Ties::kEven>());

    if (statistics)
      batch_statistics_launch(
          operation.stream(),
          BatchStatistics<A>{data<A>(deviations), mutable_data<A>(mean), mutable_data<A>(var),
                             operation.running_statistic("running_mean", running_mean),
                             operation.running_statistic("running_var", running_var), momentum, s.n, s.pixels()});
    return {gates, descriptors, hidden, pixel_ties, pooled, channel_ties, logits, mean, var};
  });
}

CBAM_OPERATION(cbam_attend)

}  // namespace cbam_fused
