// The operation cbam_backward_input, the second pass of the backward: dx and the parameters' gradients.
//   maps_backward, gate_backward, parameter_gradients, input_gradient: see their files.
#include "aligned.h"
#include "cbam_backward_input.cuh"
#include "maps_backward.cuh"
#include "mlp_backward.cuh"
#include "operation.h"

namespace cbam_fused {

using BackwardInputResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardInputResult cbam_backward_input(Tensor grad_in, Tensor x_in, Tensor channel_gate, Tensor descriptors,
                                        Tensor hidden, Tensor pixel_ties, Tensor pooled, Tensor channel_ties,
                                        OptionalTensor logits, Tensor channel_sums, OptionalTensor norm_grad,
                                        OptionalTensor norm_sums, int64_t norm_count, OptionalTensor mlp_weight1,
                                        Tensor mlp_weight2, OptionalTensor conv_weight, OptionalTensor norm_weight,
                                        OptionalTensor norm_bias, OptionalTensor norm_mean, OptionalTensor norm_var,
                                        double eps, std::string pool_text, std::string maps_text,
                                        std::string ties_text) {
  constexpr const char* kOp = "cbam_backward_input";
  const Checks checks(kOp, x_in);
  const Pool pool = parse_pool(pool_text);
  const Maps maps = parse_maps(maps_text);
  const Ties ties = parse_ties(ties_text);
  const Shape& in = checks.shape();
  const int64_t reduced = mlp_weight1 && mlp_weight1->dim() > 0 ? mlp_weight1->size(0) : 0;
  checks.mlp(mlp_weight1, std::nullopt, mlp_weight2, std::nullopt);
  checks.convolution(conv_weight, std::nullopt, maps.count);
  checks.like_x("grad", grad_in);
  checks.per_channel("channel_gate", channel_gate);
  checks.compute("descriptors", descriptors, {in.n, pool.count(), in.c});
  checks.compute("hidden", hidden, {in.n, pool.branches(), reduced});
  if (pool.max) checks.tensor("pixel_ties", pixel_ties, {in.n, in.c}, ScalarType::Int);
  checks.per_channel("channel_sums", channel_sums);
  if (logits) checks.compute("pooled", pooled, {in.n, 2, in.h, in.w});
  if (logits) checks.tensor("channel_ties", channel_ties, {in.n, in.h, in.w}, ScalarType::Int);
  checks.per_pixel("logits", logits);
  checks.per_pixel("norm_grad", norm_grad);
  checks.compute("norm_sums", norm_sums, {2});
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  STD_TORCH_CHECK(bool(logits) == bool(norm_grad) && bool(logits) == bool(conv_weight), kOp,
                  ": logits, norm_grad and conv_weight must be given together");

  const Operation operation(kOp, x_in);
  const Tensor x = aligned(dense(x_in));
  const Shape s = shape_of(x);
  const Tensor grad = aligned(in_layout(grad_in, s));
  const bool spatial = bool(logits);
  for (Tensor* t : {&channel_gate, &descriptors, &hidden, &pixel_ties, &pooled, &channel_ties, &channel_sums})
    *t = row_major(*t);
  logits = row_major(logits);
  norm_grad = row_major(norm_grad);
  const OptionalTensor weight1 = row_major(mlp_weight1), conv = row_major(conv_weight);
  const Tensor weight2 = row_major(mlp_weight2);

  return dispatch(x.scalar_type(), [&](auto element) -> BackwardInputResult {
    using Host = decltype(element);
    using T = DeviceElement<Host>;
    using A = Compute<T>;
    const NormParameters<A> norm = {
        operation.parameter<A>("norm_weight", norm_weight), operation.parameter<A>("norm_bias", norm_bias),
        operation.parameter<A>("norm_mean", norm_mean), operation.parameter<A>("norm_var", norm_var), eps};
    const T* x_data = operation.input<T>("x", x);
    const A* gate_data = operation.input<A>("channel_gate", channel_gate);
    const A* logits_data = operation.input<A>("logits", logits);
    const A* pooled_data = operation.input<A>("pooled", pooled);
    const int32_t* channel_ties_data = operation.input<int32_t>("channel_ties", channel_ties);
    const A* descriptors_data = operation.input<A>("descriptors", descriptors);

    const Tiling maps_tiling = maps_backward_tiling<T>(s);
    const MapsBackwardScratch sizes = maps_backward_scratch(maps_tiling, s);
    const int64_t taps = spatial ? conv->numel() : 0, parts = s.n * sizes.pixel_tiles;
    Tensor pixel_grads = operation.new_compute<A>("pixel_grads", {spatial ? 2 * s.n * s.pixels() : 0});
    Tensor channel_parts = operation.new_compute<A>("channel_parts", {spatial ? sizes.channel_parts : 0});
    Tensor convolution_parts = operation.new_compute<A>("convolution_parts", {spatial ? (taps + 1) * parts : 0});
    if (spatial) {
      MapsBackward<T> backward = {};
      backward.samples = s.n;
      backward.channels = s.c;
      backward.tiling = maps_tiling;
      backward.x = x_data;
      backward.channel_gate = gate_data;
      backward.channel_ties = channel_ties_data;
      backward.pixel_grads = mutable_data<A>(pixel_grads);
      backward.channel_parts = mutable_data<A>(channel_parts);
      ConvolutionBackward<A>& convolution = backward.convolution;
      convolution.height = int(s.h);
      convolution.width = int(s.w);
      convolution.kernel_size = int(conv->size(3));
      convolution.weight = operation.parameter<A>("conv_weight", conv);
      convolution.pooled = pooled_data;
      convolution.maps = maps;
      convolution.norm = {operation.input<A>("norm_grad", norm_grad), logits_data, norm,
                          operation.input<A>("norm_sums", norm_sums), A(std::max<int64_t>(norm_count, 1))};
      convolution.weight_grad_parts = mutable_data<A>(convolution_parts);
      convolution.parts = parts;
      maps_backward_launch(operation.stream(), backward, s.channels_last, ties);
    }

    const std::vector<int64_t> conv_sizes =
        spatial ? std::vector<int64_t>(conv->sizes().begin(), conv->sizes().end()) : std::vector<int64_t>{0};
    Tensor conv_weight_grad = operation.new_compute<A>("conv_weight_grad", conv_sizes);
    Tensor conv_bias_grad = operation.new_compute<A>("conv_bias_grad", {spatial});
    const int64_t grads = weight1 ? pool.branches() : 1;
    Tensor branches_grad = operation.new_compute<A>("branches_grad", {s.n, grads, s.c});
    Tensor weight1_grad, bias1_grad, weight2_grad, bias2_grad, gate_logits_grad, total_grad_parts;
    dispatch_weights<Host>(weight2, [&](auto weight_element) {
      using W = DeviceElement<decltype(weight_element)>;
      const ScalarType dtype = weight2.scalar_type();
      weight1_grad = weight1 ? operation.empty_like("mlp_weight1_grad", *weight1)
                             : operation.empty("mlp_weight1_grad", {0}, dtype);
      bias1_grad = operation.empty("mlp_bias1_grad", {reduced}, dtype);
      weight2_grad = operation.empty_like("mlp_weight2_grad", weight2);
      bias2_grad = operation.empty("mlp_bias2_grad", {s.c}, dtype);
      MlpBackward<W> mlp = {};
      mlp.samples = s.n;
      mlp.channels = int(s.c);
      mlp.width = int(weight1 ? reduced : s.c);
      mlp.branches = int(pool.branches());
      mlp.light = pool.light;
      mlp.pixel_tiles = int(sizes.pixel_tiles);
      mlp.channel_sums = operation.input<A>("channel_sums", channel_sums);
      mlp.channel_parts = spatial ? mutable_data<A>(channel_parts) : nullptr;
      mlp.channel_gate = gate_data;
      mlp.descriptors = descriptors_data;
      mlp.hidden = operation.input<A>("hidden", hidden);
      mlp.weight1 = operation.input<W>("mlp_weight1", weight1);
      mlp.weight2 = operation.input<W>("mlp_weight2", weight2);
      const MlpBackwardScratch scratch = mlp_backward_scratch(mlp);
      gate_logits_grad = operation.new_compute<A>("gate_logits_grad", {scratch.gate_logits_grad});
      total_grad_parts = operation.new_compute<A>("total_grad_parts", {scratch.total_grad_parts});
      mlp.gate_logits_grad = mutable_data<A>(gate_logits_grad);
      mlp.total_grad_parts = mutable_data<A>(total_grad_parts);
      mlp.branches_grad = mutable_data<A>(branches_grad);
      mlp.weight1_grad = mutable_data<W>(weight1_grad);
      mlp.bias1_grad = mutable_data<W>(bias1_grad);
      mlp.weight2_grad = mutable_data<W>(weight2_grad);
      mlp.bias2_grad = mutable_data<W>(bias2_grad);
      mlp.taps = int(taps);
      mlp.parts = parts;
      mlp.convolution_parts = mutable_data<A>(convolution_parts);
      mlp.convolution_weight_grad = mutable_data<A>(conv_weight_grad);
      mlp.convolution_bias_grad = mutable_data<A>(conv_bias_grad);
      mlp_backward_launch(operation.stream(), mlp);
    });

    Tensor x_grad = operation.empty_like("x_grad", x);
    InputGradient<T> input = {};
    input.samples = s.n;
    input.channels = s.c;
    input.pixels = s.pixels();
    input.tiling = tiling<T>(s);
    input.pool = pool;
    input.max_map = maps.max;
    input.grad = operation.input<T>("grad", grad);
    input.x = reads_x(pool, ties, spatial) ? x_data : nullptr;
    input.x_grad = mutable_data<T>(x_grad);
    input.channel_gate = gate_data;
    input.descriptors = descriptors_data;
    input.branches_grad = mutable_data<A>(branches_grad);
    input.grads = grads;
    input.pixel_ties = operation.input<int32_t>("pixel_ties", pixel_ties);
    input.logits = logits_data;
    input.pooled = pooled_data;
    input.channel_ties = channel_ties_data;
    input.pixel_grads = mutable_data<A>(pixel_grads);
    input.norm = norm;
    input_gradient_launch(operation.stream(), input, s.channels_last, ties);
    return {x_grad, weight1_grad, bias1_grad, weight2_grad, bias2_grad, conv_weight_grad, conv_bias_grad};
  });
}

CBAM_OPERATION(cbam_backward_input)

}  // namespace cbam_fused
