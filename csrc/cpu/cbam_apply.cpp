// cbam_apply: y = act(x * Mc * sigmoid(scale * logits + shift) + residual)
// x, y, residual [N, C, H, W]; Mc [N, C]; logits [N, H, W] in the compute dtype.
// x and residual are read once, y written once. Samples are walked from last to first, since cbam_attend, which comes
// before, ended with the last.
#include "../checks.h"
#include "forward.h"

namespace cbam_fused::cpu {

Tensor cbam_apply(Tensor x_in, Tensor channel_gate, OptionalTensor logits, OptionalTensor norm_weight,
                  OptionalTensor norm_bias, OptionalTensor norm_mean, OptionalTensor norm_var, double eps,
                  OptionalTensor residual, std::string activation) {
  const Checks checks("cbam_apply", x_in);
  checks.per_channel("channel_gate", channel_gate);
  checks.per_pixel("logits", logits);
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  checks.like_x("residual", residual);
  const Tensor x = dense(x_in);
  const Shape s = shape_of(x);
  Tensor y = torch::stable::empty_like(x);
  const OptionalTensor added = residual ? OptionalTensor(in_layout(*residual, s)) : std::nullopt;
  const Tensor gates = row_major(channel_gate);
  const OptionalTensor z = row_major(logits);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Compute<T>;
    const Norm<T> norm(norm_weight, norm_bias, norm_mean, norm_var, eps);
    const Activation<A> bounds = parse_activation<A>(activation);
    T* out = mutable_data<T>(y);
    for_samples(s.n, [&](int64_t begin, int64_t end, bool spread) {
      std::vector<A> spatial_gate(s.pixels(), A(1));
      for (int64_t n = end - 1; n >= begin; --n) {
        if (z) kernels<A>().gate(data<A>(z) + n * s.pixels(), s.pixels(), norm.scale, norm.shift, spatial_gate.data());
        const auto rows = [&](int64_t from, int64_t to) {
          apply_rows(s, data<T>(x), data<T>(added), out, n, from, to, data<A>(gates) + n * s.c, spatial_gate.data(),
                     bounds);
        };
        for_blocks(spread, s.rows(), 1, s.columns(), rows);
      }
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(cbam_fused, CPU, m) { m.impl("cbam_apply", TORCH_BOX(&cbam_apply)); }

}  // namespace cbam_fused::cpu
