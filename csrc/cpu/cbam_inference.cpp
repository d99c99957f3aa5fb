// cbam_inference: y = act(x * Mc * Ms + residual), both gates and the norm in one call.
// x, y, residual [N, C, H, W]; a sample is read three times, from the cache after the first if it fits, and written
// once. Threads take whole samples; where there are too few, each pass over a sample is spread over them.
#include "attend.h"

namespace cbam_fused::cpu {

Tensor cbam_inference(Tensor x_in, OptionalTensor mlp_weight1, OptionalTensor mlp_bias1, Tensor mlp_weight2,
                      OptionalTensor mlp_bias2, OptionalTensor conv_weight, OptionalTensor conv_bias,
                      OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor norm_mean,
                      OptionalTensor norm_var, double eps, OptionalTensor residual, std::string pool, std::string maps,
                      std::string activation) {
  const Checks checks("cbam_inference", x_in);
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  checks.like_x("residual", residual);
  const Tensor x = dense(x_in);
  Tensor y = torch::stable::empty_like(x);
  const OptionalTensor added = residual ? OptionalTensor(in_layout(*residual, shape_of(x))) : std::nullopt;
  with_attend(checks, x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias, parse_pool(pool),
              parse_maps(maps), Ties::kNone, [&](const auto& attend) {
                using T = typename std::decay_t<decltype(attend)>::Element;
                using A = Compute<T>;
                const Shape& s = attend.shape;
                const Norm<T> norm(norm_weight, norm_bias, norm_mean, norm_var, eps);
                const Activation<A> bounds = parse_activation<A>(activation);
                const auto descriptors = scratch<A>(s.n * attend.pool.count() * s.c);
                const auto hidden = scratch<A>(s.n * attend.pool.branches() * attend.mlp.reduced());
                const auto gates = scratch<A>(s.n * s.c);
                T* out = mutable_data<T>(y);
                const auto make_finish = [&](bool spread) {
                  return [&, spread, spatial_gate = std::vector<A>(s.pixels(), A(1))](int64_t n, A* logits) mutable {
                    if (attend.kernel_size)
                      kernels<A>().gate(logits, s.pixels(), norm.scale, norm.shift, spatial_gate.data());
                    const auto rows = [&](int64_t begin, int64_t end) {
                      apply_rows(s, attend.x, data<T>(added), out, n, begin, end, gates.get() + n * s.c,
                                 spatial_gate.data(), bounds);
                    };
                    for_blocks(spread, s.rows(), 1, s.columns(), rows);
                  };
                };
                attend.run(ChannelResults<A>{descriptors.get(), hidden.get(), gates.get(), nullptr},
                           SpatialResults<A>{}, make_finish);
              });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(cbam_fused, CPU, m) { m.impl("cbam_inference", TORCH_BOX(&cbam_inference)); }

}  // namespace cbam_fused::cpu
