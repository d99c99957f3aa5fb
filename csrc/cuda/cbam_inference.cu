// The operation cbam_inference: y = act(x * Mc * Ms + residual), both gates and the norm in one call.
// x, y, residual [N, C, H, W]. Five launches: pixels pooled, the two layers of the MLP, channels pooled, and
// cbam_apply, which convolves the pooled maps itself. Traffic: x three times, residual once, y once.
#include "attend.h"
#include "cbam_apply.cuh"

namespace cbam_fused {

Tensor cbam_inference(Tensor x_in, OptionalTensor mlp_weight1, OptionalTensor mlp_bias1, Tensor mlp_weight2,
                      OptionalTensor mlp_bias2, OptionalTensor conv_weight, OptionalTensor conv_bias,
                      OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor norm_mean,
                      OptionalTensor norm_var, double eps, OptionalTensor residual, std::string pool, std::string maps,
                      std::string activation) {
  const Pool pools = parse_pool(pool);
  const Maps map_order = parse_maps(maps);
  const Checks checks("cbam_inference", x_in);
  checks.mlp(mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2);
  checks.convolution(conv_weight, conv_bias, map_order.count);
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  checks.like_x("residual", residual);
  const Operation operation("cbam_inference", x_in);
  const Tensor x = aligned(dense(x_in));
  const Shape s = shape_of(x);
  const OptionalTensor added = residual ? OptionalTensor(aligned(in_layout(*residual, s))) : std::nullopt;
  const MlpTensors mlp(mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2);
  const OptionalTensor kernel = row_major(conv_weight);
  Tensor y = operation.empty_like("y", x);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = DeviceElement<decltype(element)>;
    using A = Compute<T>;
    Apply<T> p = {};
    p.x = operation.input<T>("x", x);
    p.residual = operation.input<T>("residual", added);
    p.y = mutable_data<T>(y);
    p.norm = {operation.parameter<A>("norm_weight", norm_weight), operation.parameter<A>("norm_bias", norm_bias),
              operation.parameter<A>("norm_mean", norm_mean), operation.parameter<A>("norm_var", norm_var), eps};
    p.activation = parse_activation<A>(activation);

    Tensor hidden = operation.new_compute<A>("hidden", {s.n, pools.branches(), mlp.reduced()});
    Tensor gates = operation.new_compute<A>("channel_gate", {s.n, s.c});
    p.channel_gate = mutable_data<A>(gates);
    const ChannelResults<A> results = {nullptr, nullptr, mutable_data<A>(hidden), mutable_data<A>(gates)};
    if (!kernel) return attend<Ties::kNone, true, T>(operation, x, mlp, pools, results, nullptr, p);
    const PoolsTensor<A> pooled(operation, "channel_pools", s.n, channel_parts<T>(s), s.pixels(), false, false);
    p.gate = SpatialGate::kPools;
    p.convolution = convolution_of<A, Ties::kNone>(operation, s, pooled, *kernel, conv_bias, map_order);
    attend<Ties::kNone, true, T>(operation, x, mlp, pools, results, &pooled, p);
  });
  return y;
}

CBAM_OPERATION(cbam_inference)

}  // namespace cbam_fused
