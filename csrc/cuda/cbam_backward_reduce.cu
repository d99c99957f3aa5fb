// The operation cbam_backward_reduce: see its kernels.
#include "aligned.h"
#include "cbam_backward_reduce.cuh"
#include "operation.h"

namespace cbam_fused {

std::tuple<Tensor, Tensor, Tensor, Tensor> cbam_backward_reduce(Tensor grad_in, Tensor x_in, OptionalTensor y_in,
                                                                Tensor channel_gate, OptionalTensor logits,
                                                                OptionalTensor norm_weight, OptionalTensor norm_bias,
                                                                OptionalTensor norm_mean, OptionalTensor norm_var,
                                                                double eps, std::string activation) {
  constexpr const char* kOp = "cbam_backward_reduce";
  const Checks checks(kOp, x_in);
  checks.like_x("grad", grad_in);
  checks.like_x("y", y_in);
  checks.per_channel("channel_gate", channel_gate);
  checks.per_pixel("logits", logits);
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  const bool active = activation != "none";
  STD_TORCH_CHECK(!active || y_in, kOp, ": y must be given with an activation; got None");

  const Operation operation(kOp, x_in);
  const Tensor x = aligned(dense(x_in));
  const Shape s = shape_of(x);
  const Tensor grad = aligned(in_layout(grad_in, s));
  const OptionalTensor y = active ? OptionalTensor(aligned(in_layout(*y_in, s))) : std::nullopt;
  const OptionalTensor z = row_major(logits);
  const Tensor gates = row_major(channel_gate);
  return dispatch(x.scalar_type(), [&](auto element) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = DeviceElement<decltype(element)>;
    using A = Compute<T>;
    const bool with_norm = z && norm_mean;
    Tensor masked_grad =
        active ? operation.empty_like("masked_grad", x) : operation.empty("masked_grad", {0}, x.scalar_type());
    Tensor channel_sums = operation.new_compute<A>("channel_sums", {s.n, s.c});
    Tensor norm_grad =
        operation.new_compute<A>("norm_grad", z ? std::vector<int64_t>{s.n, s.h, s.w} : std::vector<int64_t>{0});
    Tensor norm_sums = operation.new_compute<A>("norm_sums", {with_norm ? 2 : 0});

    BackwardReduce<T> arguments = {};
    arguments.samples = s.n;
    arguments.channels = s.c;
    arguments.pixels = s.pixels();
    arguments.tiling = tiling<T>(s);
    arguments.channels_last = s.channels_last;
    arguments.grad = operation.input<T>("grad", grad);
    arguments.x = operation.input<T>("x", x);
    arguments.y = operation.input<T>("y", y);
    arguments.masked_grad = active ? mutable_data<T>(masked_grad) : nullptr;
    arguments.channel_gate = operation.input<A>("channel_gate", gates);
    arguments.logits = operation.input<A>("logits", z);
    arguments.norm = {operation.parameter<A>("norm_weight", norm_weight),
                      operation.parameter<A>("norm_bias", norm_bias), operation.parameter<A>("norm_mean", norm_mean),
                      operation.parameter<A>("norm_var", norm_var), eps};
    arguments.activation = parse_activation<A>(activation);

    const BackwardReduceScratch sizes = backward_reduce_scratch(arguments.tiling, s);
    Tensor row_parts = operation.new_compute<A>("row_parts", {sizes.row_parts});
    Tensor column_parts = operation.new_compute<A>("column_parts", {sizes.column_parts});
    Tensor norm_sum_parts = operation.new_compute<A>("norm_sum_parts", {sizes.norm_sum_parts});
    backward_reduce_launch(operation.stream(), arguments, mutable_data<A>(row_parts), mutable_data<A>(column_parts),
                           mutable_data<A>(norm_sum_parts), mutable_data<A>(channel_sums),
                           z ? mutable_data<A>(norm_grad) : nullptr, with_norm ? mutable_data<A>(norm_sums) : nullptr);
    return {masked_grad, channel_sums, norm_grad, norm_sums};
  });
}

CBAM_OPERATION(cbam_backward_reduce)

}  // namespace cbam_fused
