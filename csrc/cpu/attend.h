// Phase 1 for all samples: both gates up to the logits. cbam_attend keeps what it computes; cbam_inference uses each
// sample's maps at once, while the sample is in the cache.
#pragma once

#include <atomic>

#include "../checks.h"
#include "forward.h"

namespace cbam_fused::cpu {

// Where the maps of a sample go: `apart` is 1 for one place per sample, 0 to use the first place for all.
template <class A>
struct SpatialResults {
  A* pooled;              // [N, 2, H, W]
  A* logits;              // [N, H, W]
  int32_t* channel_ties;  // [N, H, W] or null
  int64_t apart;
};

template <class T, class W>
struct Attend {
  using Element = T;
  using A = Compute<T>;
  Shape shape;
  const T* x;
  Mlp<W> mlp;
  Pool pool;
  Maps maps;
  Ties ties;
  std::vector<A> conv_weight, conv_bias;
  int64_t kernel_size;  // 0: no spatial gate

  // Samples that share a reading of the MLP's weights: as many as fit half of a core's cache, so that they are still
  // there for the next pass, or, where the weights are larger, as many as outweigh them.
  int64_t group() const {
    constexpr int64_t kCacheBytes = 1 << 20, kMost = 16;
    const int64_t weights = 2 * std::max<int64_t>(mlp.reduced(), 1) * shape.c * int64_t(sizeof(W));
    const int64_t sample = std::max<int64_t>(1, shape.sample() * int64_t(sizeof(T)));
    return std::clamp<int64_t>(std::max(kCacheBytes, 2 * weights) / sample, 1, kMost);
  }

  // Samples [begin, end), then finish(n, logits) for each of them.
  template <class F>
  void run_group(int64_t begin, int64_t end, bool spread, Convolution<A>* convolution, const ChannelResults<A>& channel,
                 const SpatialResults<A>& spatial, F& finish) const {
    const int64_t pixels = shape.pixels();
    for (int64_t n = begin; n < end; ++n) pool_pixels(shape, x, n, spread, pool, ties, channel);
    channel_gate(shape, mlp, pool, begin, end, spread, channel);
    for (int64_t n = end - 1; n >= begin; --n) {
      const int64_t place = n * spatial.apart;
      A* logits = spatial.logits + place * pixels;
      if (convolution) {
        A* pooled = spatial.pooled + place * 2 * pixels;
        int32_t* tie = spatial.channel_ties ? spatial.channel_ties + place * pixels : nullptr;
        pool_channels(shape, x, n, spread, channel.channel_gate + n * shape.c, tie ? ties : Ties::kNone,
                      pooled + maps.max * pixels, pooled + maps.mean * pixels, tie);
        convolution->set_pooled(pooled);
        convolution->run(conv_weight.data(), conv_bias.empty() ? A(0) : conv_bias[0], logits, spread);
      }
      finish(n, logits);
    }
  }

  // All samples. Each thread calls make_finish(spread) for its own `finish` and takes one group of samples after the
  // other, so that a thread that is held up holds up no other; or the work within each sample is spread over all
  // threads. Without a place for the maps it uses scratch.
  template <class F>
  void run(const ChannelResults<A>& channel, SpatialResults<A> spatial, const F& make_finish) const {
    const bool spread = split_samples(shape.n);
    const int64_t threads = spread ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), shape.n);
    const int64_t share = (shape.n + threads - 1) / std::max<int64_t>(threads, 1);
    const int64_t step = spread ? 1 : std::min(group(), share);
    std::atomic<int64_t> next{0};
    parallel(threads, 1, [&](int64_t, int64_t) {
      std::optional<Convolution<A>> convolution;
      if (kernel_size) convolution.emplace(shape, maps.count, kernel_size);
      SpatialResults<A> places = spatial;
      std::unique_ptr<A[]> own;
      if (!places.pooled) {
        own = scratch<A>(3 * shape.pixels());
        places = {own.get(), own.get() + 2 * shape.pixels(), nullptr, 0};
      }
      auto finish = make_finish(spread);
      for (int64_t n = next.fetch_add(step); n < shape.n; n = next.fetch_add(step))
        run_group(n, std::min(shape.n, n + step), spread, convolution ? &*convolution : nullptr, channel, places,
                  finish);
    });
  }
};

// Checks an operation's arguments, builds the above from them and calls f with it; x is dense.
template <class F>
auto with_attend(const Checks& checks, const Tensor& x, const OptionalTensor& mlp_weight1,
                 const OptionalTensor& mlp_bias1, const Tensor& mlp_weight2, const OptionalTensor& mlp_bias2,
                 const OptionalTensor& conv_weight, const OptionalTensor& conv_bias, const Pool& pool, const Maps& maps,
                 Ties ties, F f) {
  checks.mlp(mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2);
  checks.convolution(conv_weight, conv_bias, maps.count);
  return dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    return dispatch_weights<T>(mlp_weight2, [&](auto weight_element) {
      using W = decltype(weight_element);
      const Attend<T, W> attend{shape_of(x),
                                data<T>(x),
                                make_mlp<W>(mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2),
                                pool,
                                maps,
                                ties,
                                parameter<T>(conv_weight),
                                parameter<T>(conv_bias),
                                conv_weight ? conv_weight->size(3) : 0};
      return f(attend);
    });
  });
}

}  // namespace cbam_fused::cpu
