// cbam_backward_reduce: the first pass of the backward. With g = grad through the activation and p = g * x,
//   channel_sums[n, c] = sum_hw p Ms,   q[n, hw] = sum_c p Mc,   norm_grad = q Ms (1 - Ms)
// from one reading of grad and x (and y, and one writing of masked_grad, where there is an activation).
// Both sums come from one walk over the matrix of a sample: one is along its rows, the other along its columns. Column
// sums are made per leaf of kLeafRows rows and added in ascending order, however the leaves are spread over threads.
#include "../checks.h"
#include "forward.h"

namespace cbam_fused::cpu {

namespace {

template <class T>
struct Reduce {
  using A = Compute<T>;
  Shape s;
  const T *grad, *x, *y;  // y null without an activation
  T* masked_grad;
  const A* channel_gate;  // [N, C]
  Activation<A> activation;

  // Sample n: row and column sums of its matrix. `partial` has room for one leaf, or for all with `spread`; `totals`
  // for the columns.
  void run(int64_t n, const A* spatial_gate, bool spread, A* partial, Wide<A>* totals, A* channel_sums,
           A* pixel_sums) const {
    const int64_t offset = n * s.sample(), columns = s.columns();
    const A* gate = channel_gate + n * s.c;
    const A* row_weight = s.channels_last ? spatial_gate : gate;
    const A* column_weight = s.channels_last ? gate : spatial_gate;
    A* row_sums = s.channels_last ? pixel_sums : channel_sums;
    A* column_sums = s.channels_last ? channel_sums : pixel_sums;
    const int64_t leaves = (s.rows() + kLeafRows - 1) / kLeafRows;
    const auto leaf = [&](int64_t index, A* out) {
      kernels<T>().reduce_products(grad + offset, x + offset, y ? y + offset : nullptr,
                                   masked_grad ? masked_grad + offset : nullptr, columns, index * kLeafRows,
                                   std::min(s.rows(), (index + 1) * kLeafRows), row_weight, column_weight, activation,
                                   row_sums, out);
    };
    const auto add = [&](int64_t index, const A* sums, int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) totals[j] = index == 0 ? Wide<A>(sums[j]) : totals[j] + sums[j];
    };
    if (spread) {
      parallel(leaves, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) leaf(i, partial + i * columns);
      });
      for_blocks(true, columns, kColumnBlock, leaves, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < leaves; ++i) add(i, partial + i * columns, begin, end);
      });
    } else {
      for (int64_t i = 0; i < leaves; ++i) {
        leaf(i, partial);
        add(i, partial, 0, columns);
      }
    }
    std::copy_n(totals, columns, column_sums);
  }
};

}  // namespace

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
  const Tensor x = dense(x_in);
  const Shape s = shape_of(x);
  const Tensor grad = in_layout(grad_in, s);
  const bool active = activation != "none";
  STD_TORCH_CHECK(!active || y_in, kOp, ": y must be given with an activation; got None");
  const OptionalTensor y = active ? OptionalTensor(in_layout(*y_in, s)) : std::nullopt;
  const OptionalTensor z = row_major(logits);
  const Tensor gates = row_major(channel_gate);
  return dispatch(x.scalar_type(), [&](auto element) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(element);
    using A = Compute<T>;
    const Norm<T> norm(norm_weight, norm_bias, norm_mean, norm_var, eps);
    const bool with_norm = norm.present && z;
    Tensor masked = active ? torch::stable::empty_like(x) : empty({0}, x.scalar_type(), x);
    Tensor channel_sums = new_compute<A>({s.n, s.c}, x);
    Tensor norm_grad = new_compute<A>(z ? std::vector<int64_t>{s.n, s.h, s.w} : std::vector<int64_t>{0}, x);
    Tensor norm_sums = new_compute<A>({with_norm ? 2 : 0}, x);
    std::vector<Wide<A>> sums(2 * s.n);  // per sample: of norm_grad, and of norm_grad * normalised logits

    const Reduce<T> reduce{s,
                           data<T>(grad),
                           data<T>(x),
                           data<T>(y),
                           active ? mutable_data<T>(masked) : nullptr,
                           data<A>(gates),
                           parse_activation<A>(activation)};
    for_samples(s.n, [&](int64_t begin, int64_t end, bool spread) {
      const int64_t pixels = s.pixels(), leaves = (s.rows() + kLeafRows - 1) / kLeafRows;
      const auto partial = scratch<A>((spread ? leaves : 1) * s.columns());
      const auto totals = scratch<Wide<A>>(s.columns());
      std::vector<A> spatial_gate(pixels, A(1)), pixel_sums(pixels);
      for (int64_t n = begin; n < end; ++n) {
        const A* sample_z = z ? data<A>(z) + n * pixels : nullptr;
        if (z) kernels<A>().gate(sample_z, pixels, norm.scale, norm.shift, spatial_gate.data());
        reduce.run(n, spatial_gate.data(), spread, partial.get(), totals.get(), mutable_data<A>(channel_sums) + n * s.c,
                   pixel_sums.data());
        if (!z) continue;
        A* out = mutable_data<A>(norm_grad) + n * pixels;
        for (int64_t i = 0; i < pixels; ++i) {
          out[i] = pixel_sums[i] * spatial_gate[i] * (A(1) - spatial_gate[i]);
          sums[2 * n] += out[i];
          sums[2 * n + 1] += Wide<A>(out[i]) * ((sample_z[i] - norm.mean) * norm.inverse_deviation);
        }
      }
    });
    for (int i = 0; with_norm && i < 2; ++i) {
      Wide<A> total = 0;
      for (int64_t n = 0; n < s.n; ++n) total += sums[2 * n + i];
      mutable_data<A>(norm_sums)[i] = A(total);
    }
    return {masked, channel_sums, norm_grad, norm_sums};
  });
}

STABLE_TORCH_LIBRARY_IMPL(cbam_fused, CPU, m) { m.impl("cbam_backward_reduce", TORCH_BOX(&cbam_backward_reduce)); }

}  // namespace cbam_fused::cpu
