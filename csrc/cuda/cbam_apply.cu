// The operation cbam_apply, and its kernel.
#include "aligned.h"
#include "cbam_apply.cuh"
#include "operation.h"

namespace cbam_fused {

template <class T, bool kAligned, bool kChannelsLast>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 8 ? 2 : 3) apply_kernel(Apply<T> p) {
  DYNAMIC_SHARED(Compute<T>, room);
  apply<kAligned, kChannelsLast>(p, room, blockIdx.x);
}

template <class T>
void apply_launch(const Stream& stream, Apply<T> p, const Shape& shape) {
  p.tile(shape);
  const auto kernel = p.tiling.aligned
                          ? (shape.channels_last ? apply_kernel<T, true, true> : apply_kernel<T, true, false>)
                          : (shape.channels_last ? apply_kernel<T, false, true> : apply_kernel<T, false, false>);
  launch(stream, "apply", kernel, {shape.n * p.tiling.tiles(), kTileThreads, p.room()}, p);
}

template void apply_launch(const Stream&, Apply<float>, const Shape&);
template void apply_launch(const Stream&, Apply<double>, const Shape&);
template void apply_launch(const Stream&, Apply<__half>, const Shape&);
template void apply_launch(const Stream&, Apply<__nv_bfloat16>, const Shape&);

Tensor cbam_apply(Tensor x_in, Tensor channel_gate, OptionalTensor logits, OptionalTensor norm_weight,
                  OptionalTensor norm_bias, OptionalTensor norm_mean, OptionalTensor norm_var, double eps,
                  OptionalTensor residual, std::string activation) {
  const Checks checks("cbam_apply", x_in);
  checks.per_channel("channel_gate", channel_gate);
  checks.per_pixel("logits", logits);
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  checks.like_x("residual", residual);
  const Operation operation("cbam_apply", x_in);
  const Tensor x = aligned(dense(x_in)), gates = aligned(row_major(channel_gate));
  const Shape s = shape_of(x);
  const OptionalTensor added = residual ? OptionalTensor(aligned(in_layout(*residual, s))) : std::nullopt;
  const OptionalTensor z = row_major(logits);
  Tensor y = operation.empty_like("y", x);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = DeviceElement<decltype(element)>;
    using A = Compute<T>;
    Apply<T> p = {};
    p.x = operation.input<T>("x", x);
    p.residual = operation.input<T>("residual", added);
    p.y = mutable_data<T>(y);
    p.channel_gate = operation.input<A>("channel_gate", gates);
    p.gate = z ? SpatialGate::kLogits : SpatialGate::kNone;
    p.logits = operation.input<A>("logits", z);
    p.norm = {operation.parameter<A>("norm_weight", norm_weight), operation.parameter<A>("norm_bias", norm_bias),
              operation.parameter<A>("norm_mean", norm_mean), operation.parameter<A>("norm_var", norm_var), eps};
    p.activation = parse_activation<A>(activation);
    apply_launch(operation.stream(), p, s);
  });
  return y;
}

CBAM_OPERATION(cbam_apply)

}  // namespace cbam_fused
