// cbam_backward_input: dx and the gradients of the parameters, in three steps.
//   1. per sample: the backward of norm and convolution, on maps; then the one pass over x,
//      t2[n, c] = sum_hw x (ds_mean / C + ds_max share_c); the channel logits' gradient is (channel_sums + t2) Mc (1 -
//      Mc)
//   2. for all samples: the backward of the MLP
//   3. per sample, reading g and writing dx:
//      dx = Mc (g Ms + ds_mean / C + ds_max share_c) + davg / HW + dmax share_hw + ...
// share: 1 at the saved index (ties first), or 1 / count at each maximum (ties even; reads x again, as lp and lse do).
#include "../checks.h"
#include "forward.h"

namespace cbam_fused::cpu {

namespace {

template <class T, class W>
struct BackwardInput {
  using A = Compute<T>;
  static constexpr const char* kOp = "cbam_backward_input";

  Shape s;
  const T *grad, *x;
  const A *channel_gate, *descriptors, *hidden;
  const int32_t* pixel_ties;
  const A* pooled;
  const int32_t* channel_ties;
  const A *logits, *channel_sums, *norm_grad;  // logits and norm_grad null without a spatial gate
  Mlp<W> mlp;
  std::vector<A> conv_weight;
  int64_t kernel_size;
  Norm<T> norm;
  std::vector<A> norm_grad_means;  // empty where the norm's statistics are constants
  Pool pool;
  Maps maps;
  Ties ties;

  // Per pixel, for all samples [N, H, W]; per channel, of the logits and of each pooled descriptor [N, P, C].
  std::unique_ptr<A[]> spatial_gate = {}, pixel_offset = {}, pixel_max_grad = {};
  std::unique_ptr<A[]> channel_logits_grad = {}, descriptor_grads = {};

  int64_t taps() const { return maps.count * kernel_size * kernel_size; }

  void allocate() {
    const int64_t pixels = s.n * s.pixels();
    spatial_gate = scratch<A>(pixels);
    pixel_offset = scratch<A>(pixels);
    pixel_max_grad = scratch<A>(pixels);
    channel_logits_grad = scratch<A>(s.n * s.c);
    descriptor_grads = scratch<A>(s.n * pool.count() * s.c);
  }

  // ---- Step 1 -------------------------------------------------------------------------------------------------------

  // The backward of norm and convolution of sample n: fills spatial_gate, pixel_offset and pixel_max_grad, and gives
  // this sample's parameter gradients: weight_grad [taps], and as the result that of the bias.
  A spatial_backward(int64_t n, Convolution<A>& forward, Convolution<A>& transposed, A* z_grad, A* map_grad,
                     A* weight_grad) {
    const int64_t pixels = s.pixels(), at = n * pixels;
    kernels<A>().gate(logits + at, pixels, norm.scale, norm.shift, &spatial_gate[at]);
    Wide<A> bias_grad = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      A g = norm_grad[at + i];
      if (!norm_grad_means.empty()) {
        const A normalised = (logits[at + i] - norm.mean) * norm.inverse_deviation;
        g -= norm_grad_means[0] + normalised * norm_grad_means[1];
      }
      z_grad[i] = g * norm.scale;
      bias_grad += z_grad[i];
    }
    forward.set_pooled(pooled + n * 2 * pixels);
    forward.weight_grad(z_grad, weight_grad);

    transposed.set_map(0, z_grad);
    const int64_t area = kernel_size * kernel_size;
    std::vector<A> flipped(area);
    A* offset = &pixel_offset[at];
    A* share = &pixel_max_grad[at];
    for (int64_t m = 0; m < maps.count; ++m) {
      std::reverse_copy(conv_weight.begin() + m * area, conv_weight.begin() + (m + 1) * area, flipped.begin());
      A* target = maps.count == 1 ? map_grad : m == maps.max ? share : offset;
      transposed.run(flipped.data(), A(0), target);
    }
    const int32_t* tie = channel_ties + at;
    for (int64_t i = 0; i < pixels; ++i) {
      if (maps.count == 1) offset[i] = share[i] = A(0.5) * map_grad[i];
      offset[i] /= A(s.c);
      if (ties == Ties::kEven) share_evenly(tie[i], share[i], offset[i]);
    }
    return A(bias_grad);
  }

  // The share of each of `count` maxima. No count: the maximum is NaN, and so is the gradient of the whole slice.
  static void share_evenly(int32_t count, A& share, A& offset) {
    if (count == 0) offset = std::numeric_limits<A>::quiet_NaN();
    share = count == 0 ? A(0) : share / A(count);
  }

  // t2 of channels [begin, end) of sample n.
  void channel_sums_of_maps(int64_t n, int64_t begin, int64_t end, A* sums) const {
    const int64_t at = n * s.pixels();
    const T* source = x + n * s.sample();
    const A* gate = channel_gate + n * s.c;
    const A* max = ties == Ties::kEven ? pooled + n * 2 * s.pixels() + maps.max * s.pixels() : nullptr;
    const Kernels<T>& k = kernels<T>();
    if (s.channels_last)
      k.weigh_columns(source, s.rows(), s.columns(), begin, end, &pixel_offset[at], gate, max, &pixel_max_grad[at],
                      sums);
    else
      k.weigh_rows(source, s.columns(), begin, end, &pixel_offset[at], gate, max, &pixel_max_grad[at], sums);
  }

  // The part of t2 that reaches the channels whose index was saved.
  void scatter_max(int64_t n, Wide<A>* sums) const {
    const int64_t at = n * s.pixels();
    const T* source = x + n * s.sample();
    for (int64_t i = 0; i < s.pixels(); ++i) {
      const int64_t c = channel_ties[at + i];
      STD_TORCH_CHECK(c >= 0 && c < s.c, kOp, ": channel_ties must hold indices below C = ", s.c, "; got ", c);
      const int64_t element = s.channels_last ? i * s.c + c : c * s.pixels() + i;
      sums[c] += Wide<A>(to_compute(source[element])) * pixel_max_grad[at + i];
    }
  }

  // Returns the convolution's gradients: weight [taps], then bias.
  std::vector<A> maps_backward() {
    std::vector<A> per_sample(s.n * (taps() + 1));
    for_samples(s.n, [&](int64_t begin, int64_t end, bool spread) {
      const int64_t pixels = s.pixels();
      std::optional<Convolution<A>> forward, transposed;
      if (logits) {
        forward.emplace(s, maps.count, kernel_size);
        transposed.emplace(s, 1, kernel_size);
      }
      const auto z_grad = scratch<A>(pixels), map_grad = scratch<A>(pixels), sums = scratch<A>(s.c);
      const auto totals = scratch<Wide<A>>(s.c);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(channel_sums + n * s.c, s.c, totals.get());
        if (logits) {
          A* grads = &per_sample[n * (taps() + 1)];
          grads[taps()] = spatial_backward(n, *forward, *transposed, z_grad.get(), map_grad.get(), grads);
          for_blocks(spread, s.c, s.channels_last ? kColumnBlock : 1, pixels,
                     [&](int64_t from, int64_t to) { channel_sums_of_maps(n, from, to, sums.get()); });
          for (int64_t c = 0; c < s.c; ++c) totals[c] += sums[c];
          if (ties == Ties::kFirst) scatter_max(n, totals.get());
        } else {
          std::fill_n(&spatial_gate[n * pixels], pixels, A(1));
          std::fill_n(&pixel_offset[n * pixels], pixels, A(0));
          std::fill_n(&pixel_max_grad[n * pixels], pixels, A(0));
        }
        for (int64_t c = 0; c < s.c; ++c) {
          const A gate = channel_gate[n * s.c + c];
          channel_logits_grad[n * s.c + c] = A(totals[c] * gate * (A(1) - gate));
        }
      }
    });
    std::vector<A> grads(taps() + 1);
    for (int64_t i = 0; i <= taps(); ++i) {
      Wide<A> total = 0;
      for (int64_t n = 0; n < s.n; ++n) total += per_sample[n * (taps() + 1) + i];
      grads[i] = A(total);
    }
    return grads;
  }

  // ---- Step 2 -------------------------------------------------------------------------------------------------------

  void mlp_backward(W* weight1_grad, W* bias1_grad, W* weight2_grad, W* bias2_grad) {
    const Kernels<W>& k = kernels<W>();
    const int64_t branches = pool.branches(), reduced = mlp.reduced(), vectors = s.n * branches;
    const std::vector<A> ones(vectors, A(1)), branch_counts(s.n, A(branches));

    std::vector<A> own_inputs, own_sums;
    const A* inputs = mlp_inputs(descriptors, pool.light, s.n, s.c, own_inputs);
    const int64_t width = mlp.weight1 ? reduced : s.c;
    const A* sums = sum_branches(mlp.weight1 ? hidden : inputs, s.n, branches, width, own_sums);

    const A* logits_grad = channel_logits_grad.get();
    for_blocks(true, s.c, 1, width * s.n, [&](int64_t begin, int64_t end) {
      k.outer_products(logits_grad, sums, s.n, s.c, width, begin, end, weight2_grad);
    });
    k.outer_products(branch_counts.data(), logits_grad, s.n, 1, s.c, 0, 1, bias2_grad);

    const auto sums_grad = scratch<A>(s.n * width);
    for_blocks(true, width, kColumnBlock, s.c * s.n, [&](int64_t begin, int64_t end) {
      k.transposed_products(data<W>(mlp.weight2), s.c, width, begin, end, logits_grad, s.n, sums_grad.get());
    });
    // Every branch receives the gradient of the sum, through its own ReLU.
    std::vector<A> layer_grad(vectors * width);
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t j = 0; j < width; ++j) {
        const bool blocked = mlp.weight1 && hidden[v * width + j] <= A(0);
        layer_grad[v * width + j] = blocked ? A(0) : sums_grad[v / branches * width + j];
      }
    std::vector<A> inputs_grad;
    if (mlp.weight1) {
      for_blocks(true, reduced, 1, s.c * vectors, [&](int64_t begin, int64_t end) {
        k.outer_products(layer_grad.data(), inputs, vectors, reduced, s.c, begin, end, weight1_grad);
      });
      k.outer_products(ones.data(), layer_grad.data(), vectors, 1, reduced, 0, 1, bias1_grad);
      inputs_grad.resize(vectors * s.c);
      for_blocks(true, s.c, kColumnBlock, reduced * vectors, [&](int64_t begin, int64_t end) {
        k.transposed_products(data<W>(mlp.weight1), reduced, s.c, begin, end, layer_grad.data(), vectors,
                              inputs_grad.data());
      });
    } else {
      inputs_grad.swap(layer_grad);
    }
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t p = 0; p < pool.count(); ++p)
        for (int64_t c = 0; c < s.c; ++c)
          descriptor_grads[(n * pool.count() + p) * s.c + c] =
              pool.light ? A(0.5) * inputs_grad[n * s.c + c] : inputs_grad[(n * branches + p) * s.c + c];
  }

  // ---- Step 3 -------------------------------------------------------------------------------------------------------

  void input_backward(T* x_grad) const {
    for_samples(s.n, [&](int64_t begin, int64_t end, bool spread) {
      std::vector<A> offset(s.c), max_grad(s.c), lp_grad(s.c), zero_map(s.pixels());
      const std::vector<int32_t> no_index(std::max(s.c, s.pixels()), -1);
      for (int64_t n = end - 1; n >= begin; --n) {
        const int64_t at = n * s.pixels();
        const A* values = descriptors + n * pool.count() * s.c;
        const A* grads = &descriptor_grads[n * pool.count() * s.c];
        std::fill(offset.begin(), offset.end(), A(0));
        std::fill(max_grad.begin(), max_grad.end(), A(0));
        InputGradientTerms<A> terms{};
        terms.channel_gate = channel_gate + n * s.c;
        terms.channel_offset = offset.data();
        terms.channel_max_grad = max_grad.data();
        terms.pixel_index = no_index.data();
        terms.channel_max = values;
        terms.spatial_gate = &spatial_gate[at];
        terms.pixel_offset = &pixel_offset[at];
        terms.pixel_max_grad = &pixel_max_grad[at];
        terms.channel_index = logits ? channel_ties + at : no_index.data();
        terms.pixel_max = logits ? pooled + 2 * at + maps.max * s.pixels() : zero_map.data();

        const auto next = [&] {
          values += s.c;
          grads += s.c;
        };
        if (pool.avg) {
          for (int64_t c = 0; c < s.c; ++c) offset[c] = grads[c] / A(s.pixels());
          next();
        }
        if (pool.max) {
          terms.channel_max = values;
          terms.pixel_index = pixel_ties + n * s.c;
          for (int64_t c = 0; c < s.c; ++c) {
            max_grad[c] = grads[c];
            if (ties == Ties::kEven) share_evenly(terms.pixel_index[c], max_grad[c], offset[c]);
          }
          next();
        }
        if (pool.lp) {
          for (int64_t c = 0; c < s.c; ++c) lp_grad[c] = values[c] == A(0) ? A(0) : grads[c] / values[c];
          terms.channel_lp_grad = lp_grad.data();
          next();
        }
        if (pool.lse) {
          terms.channel_lse = values;
          terms.channel_lse_grad = grads;
        }
        const int64_t sample = n * s.sample();
        for_blocks(spread, s.rows(), 1, s.columns(), [&](int64_t from, int64_t to) {
          kernels<T>().input_gradient(grad + sample, x + sample, x_grad + sample, s.columns(), from, to,
                                      !s.channels_last, ties, terms);
        });
      }
    });
  }
};

}  // namespace

using BackwardInputResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardInputResult cbam_backward_input(Tensor grad_in, Tensor x_in, Tensor channel_gate, Tensor descriptors,
                                        Tensor hidden, Tensor pixel_ties, Tensor pooled, Tensor channel_ties,
                                        OptionalTensor logits, Tensor channel_sums, OptionalTensor norm_grad,
                                        OptionalTensor norm_sums, int64_t norm_count, OptionalTensor mlp_weight1,
                                        Tensor mlp_weight2, OptionalTensor conv_weight, OptionalTensor norm_weight,
                                        OptionalTensor norm_bias, OptionalTensor norm_mean, OptionalTensor norm_var,
                                        double eps, std::string pool, std::string maps, std::string ties) {
  constexpr const char* kOp = "cbam_backward_input";
  const Checks checks(kOp, x_in);
  const Pool pools = parse_pool(pool);
  const Maps map_order = parse_maps(maps);
  const Shape& in = checks.shape();
  const int64_t reduced = mlp_weight1 && mlp_weight1->dim() > 0 ? mlp_weight1->size(0) : 0;
  checks.mlp(mlp_weight1, std::nullopt, mlp_weight2, std::nullopt);
  checks.convolution(conv_weight, std::nullopt, map_order.count);
  checks.like_x("grad", grad_in);
  checks.per_channel("channel_gate", channel_gate);
  checks.compute("descriptors", descriptors, {in.n, pools.count(), in.c});
  checks.compute("hidden", hidden, {in.n, pools.branches(), reduced});
  if (pools.max) checks.tensor("pixel_ties", pixel_ties, {in.n, in.c}, ScalarType::Int);
  checks.per_channel("channel_sums", channel_sums);
  if (logits) checks.compute("pooled", pooled, {in.n, 2, in.h, in.w});
  if (logits) checks.tensor("channel_ties", channel_ties, {in.n, in.h, in.w}, ScalarType::Int);
  checks.per_pixel("logits", logits);
  checks.per_pixel("norm_grad", norm_grad);
  checks.compute("norm_sums", norm_sums, {2});
  checks.norm(norm_weight, norm_bias, norm_mean, norm_var);
  const Tensor x = dense(x_in);
  const Shape s = shape_of(x);
  const Tensor grad = in_layout(grad_in, s);
  for (Tensor* t : {&channel_gate, &descriptors, &hidden, &pixel_ties, &pooled, &channel_ties, &channel_sums})
    *t = row_major(*t);
  logits = row_major(logits);
  norm_grad = row_major(norm_grad);
  STD_TORCH_CHECK(bool(logits) == bool(norm_grad) && bool(logits) == bool(conv_weight), kOp,
                  ": logits, norm_grad and conv_weight must be given together");
  return dispatch(x.scalar_type(), [&](auto element) -> BackwardInputResult {
    using T = decltype(element);
    using A = Compute<T>;
    return dispatch_weights<T>(mlp_weight2, [&](auto weight_element) -> BackwardInputResult {
      using W = decltype(weight_element);
      const ScalarType dtype = std::is_same_v<W, T> ? x.scalar_type() : compute_dtype<A>();
      BackwardInput<T, W> backward{s,
                                   data<T>(grad),
                                   data<T>(x),
                                   data<A>(channel_gate),
                                   data<A>(descriptors),
                                   data<A>(hidden),
                                   data<int32_t>(pixel_ties),
                                   data<A>(pooled),
                                   data<int32_t>(channel_ties),
                                   data<A>(logits),
                                   data<A>(channel_sums),
                                   data<A>(norm_grad),
                                   make_mlp<W>(mlp_weight1, std::nullopt, mlp_weight2, std::nullopt),
                                   parameter<T>(conv_weight),
                                   conv_weight ? conv_weight->size(3) : 0,
                                   Norm<T>(norm_weight, norm_bias, norm_mean, norm_var, eps),
                                   values_of<A>(norm_sums),
                                   pools,
                                   map_order,
                                   parse_ties(ties)};
      Tensor x_grad = torch::stable::empty_like(x);
      const auto like = [&](const OptionalTensor& t, ScalarType of_grad) {
        return empty(t ? std::vector<int64_t>{t->sizes().begin(), t->sizes().end()} : std::vector<int64_t>{0}, of_grad,
                     x);
      };
      Tensor weight1_grad = like(mlp_weight1, dtype), weight2_grad = like(mlp_weight2, dtype);
      Tensor bias1_grad = empty({reduced}, dtype, x), bias2_grad = empty({s.c}, dtype, x);
      Tensor conv_weight_grad = like(conv_weight, compute_dtype<A>());
      Tensor conv_bias_grad = new_compute<A>({bool(conv_weight)}, x);

      for (A& sum : backward.norm_grad_means) sum /= A(norm_count);
      backward.allocate();
      const std::vector<A> conv_grads = backward.maps_backward();
      backward.mlp_backward(mutable_data<W>(weight1_grad), mutable_data<W>(bias1_grad), mutable_data<W>(weight2_grad),
                            mutable_data<W>(bias2_grad));
      backward.input_backward(mutable_data<T>(x_grad));
      if (conv_weight) {
        std::copy(conv_grads.begin(), conv_grads.end() - 1, mutable_data<A>(conv_weight_grad));
        *mutable_data<A>(conv_bias_grad) = conv_grads.back();
      }
      return {x_grad, weight1_grad, bias1_grad, weight2_grad, bias2_grad, conv_weight_grad, conv_bias_grad};
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(cbam_fused, CPU, m) { m.impl("cbam_backward_input", TORCH_BOX(&cbam_backward_input)); }

}  // namespace cbam_fused::cpu
