// cbam_attend: phase 1, everything that y and the backward need of x except x itself.
// x [N, C, H, W] is read twice, the second time from the cache if a sample fits it; the results are [N, C] and
// [N, H, W] maps. The batch's statistics merge those of each sample (Chan et al., 1979) in the order of the samples.
#include "attend.h"

namespace cbam_fused::cpu {

namespace {

// Count, mean and sum of squared deviations of `values`.
template <class Sum>
struct Statistics {
  Sum count = 0, mean = 0, squares = 0;

  template <class A>
  static Statistics of(const A* values, int64_t count) {
    constexpr int64_t kChains = 8;
    const auto sum = [&](const auto& term) {
      Sum chains[kChains] = {};
      int64_t i = 0;
      for (; i + kChains <= count; i += kChains)
        for (int64_t c = 0; c < kChains; ++c) chains[c] += term(values[i + c]);
      for (; i < count; ++i) chains[0] += term(values[i]);
      return ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
    };
    const Sum mean = sum([](Sum v) { return v; }) / Sum(count);
    return {Sum(count), mean, sum([&](Sum v) { return (v - mean) * (v - mean); })};
  }

  void merge(const Statistics& other) {
    const Sum total = count + other.count, difference = other.mean - mean;
    squares += other.squares + difference * difference * count * other.count / total;
    mean += difference * other.count / total;
    count = total;
  }
};

// t[0] moves towards `value` by `momentum`; t in any float.
void move_towards(OptionalTensor& t, double value, double momentum) {
  if (!t) return;
  dispatch(t->scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* target = mutable_data<T>(*t);
    *target = from_double<T>((1 - momentum) * double(to_compute(*target)) + momentum * value);
  });
}

}  // namespace

using AttendResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AttendResult cbam_attend(Tensor x_in, OptionalTensor mlp_weight1, OptionalTensor mlp_bias1, Tensor mlp_weight2,
                         OptionalTensor mlp_bias2, OptionalTensor conv_weight, OptionalTensor conv_bias,
                         bool batch_statistics, OptionalTensor running_mean, OptionalTensor running_var,
                         double momentum, std::string pool, std::string maps, std::string ties) {
  const Checks checks("cbam_attend", x_in);
  checks.running("running_mean", running_mean);
  checks.running("running_var", running_var);
  const Tensor x = dense(x_in);
  return with_attend(
      checks, x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias, parse_pool(pool),
      parse_maps(maps), parse_ties(ties), [&](const auto& attend) -> AttendResult {
        using T = typename std::decay_t<decltype(attend)>::Element;
        using A = Compute<T>;
        const Shape& s = attend.shape;
        const bool spatial = attend.kernel_size > 0;
        const auto if_spatial = [&](std::vector<int64_t> sizes) { return spatial ? sizes : std::vector<int64_t>{0}; };
        Tensor gates = new_compute<A>({s.n, s.c}, x);
        Tensor descriptors = new_compute<A>({s.n, attend.pool.count(), s.c}, x);
        Tensor hidden = new_compute<A>({s.n, attend.pool.branches(), attend.mlp.reduced()}, x);
        Tensor pixel_ties =
            empty(attend.pool.max ? std::vector<int64_t>{s.n, s.c} : std::vector<int64_t>{0}, ScalarType::Int, x);
        Tensor pooled = new_compute<A>(if_spatial({s.n, 2, s.h, s.w}), x);
        Tensor channel_ties = empty(if_spatial({s.n, s.h, s.w}), ScalarType::Int, x);
        Tensor logits = new_compute<A>(if_spatial({s.n, s.h, s.w}), x);
        const bool statistics = spatial && batch_statistics;
        Tensor mean = new_compute<A>({statistics}, x), var = new_compute<A>({statistics}, x);

        std::vector<Statistics<Wide<A>>> samples(statistics ? s.n : 0);
        const auto make_finish = [&](bool) {
          return [&](int64_t n, const A* sample_logits) {
            if (statistics) samples[n] = Statistics<Wide<A>>::of(sample_logits, s.pixels());
          };
        };
        attend.run(
            ChannelResults<A>{mutable_data<A>(descriptors), mutable_data<A>(hidden), mutable_data<A>(gates),
                              attend.pool.max ? mutable_data<int32_t>(pixel_ties) : nullptr},
            SpatialResults<A>{mutable_data<A>(pooled), mutable_data<A>(logits), mutable_data<int32_t>(channel_ties), 1},
            make_finish);
        if (statistics) {
          Statistics<Wide<A>> batch;
          for (const auto& sample : samples) batch.count ? batch.merge(sample) : void(batch = sample);
          *mutable_data<A>(mean) = A(batch.mean);
          *mutable_data<A>(var) = batch.count ? A(batch.squares / batch.count) : A(0);
          if (batch.count) {
            move_towards(running_mean, double(batch.mean), momentum);
            move_towards(running_var, double(batch.squares / (batch.count - 1)), momentum);
          }
        }
        return {gates, descriptors, hidden, pixel_ties, pooled, channel_ties, logits, mean, var};
      });
}

STABLE_TORCH_LIBRARY_IMPL(cbam_fused, CPU, m) { m.impl("cbam_attend", TORCH_BOX(&cbam_attend)); }

}  // namespace cbam_fused::cpu
