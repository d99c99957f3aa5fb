// input_gradient: the last pass of the backward,
//   dx = Mc (g Ms + a) + davg / HW + dmax share_hw + dlp x / lp + dlse exp(x - lse),   a = ds_mean / C + ds_max share_c
// with what the kernels before it left: the gradients of the descriptors and of the pooled maps.
// Traffic: g once, dx written once; x once for ties "even", lp and lse.
// A block per tile of x; the last sample first.
#pragma once

#include <type_traits>

#include "gate.h"
#include "maximum_backward.h"
#include "tile.h"

namespace cbam_fused {

template <class T>
struct InputGradient {
  using A = Compute<T>;

  int64_t samples, channels, pixels;
  Tiling tiling;
  Pool pool;
  int64_t max_map;  // which of the pooled maps is the maximum

  const T* grad;                // as x
  const T* x;                   // [N, rows, columns], or null where no term needs it
  T* x_grad;                    // as x, out
  const A* channel_gate;        // [N, C]
  const A* descriptors;         // [N, P, C]
  const A* branches_grad;       // [N, grads, C]
  int64_t grads;                // of a sample: one of each descriptor, or 1 that serves all
  const int32_t* pixel_ties;    // [N, C]
  const A* logits;              // [N, HW], or null without a spatial gate, as all the others of it
  const A* pooled;              // [N, 2, HW]
  const int32_t* channel_ties;  // [N, HW]
  const A* pixel_grads;         // [N, 2, HW]: ds_mean / C, and ds_max of each maximum
  NormParameters<A> norm;
};

// What dx needs of a channel, and of a pixel. kPowers: lp or lse may be among the pools.
template <class A>
struct PowerTerms {
  A lp_slope;        // dlp / lp
  A lse_slope, lse;  // dlse, and lse itself
};
struct NoPowerTerms {};
template <class A, Ties ties, bool kPowers>
struct alignas(16) ChannelTerms : std::conditional_t<kPowers, PowerTerms<A>, NoPowerTerms> {
  A gate, offset;            // Mc; what all its pixels get
  MaximumGrad<A, ties> max;  // what each of its maxima gets
};
template <class A, Ties ties>
struct alignas(16) PixelTerms {
  A gate;  // Ms
  PixelGrad<A, ties> grad;
};

// The terms of channel c of sample n.
template <Ties ties, bool kPowers, class T>
__device__ inline ChannelTerms<Compute<T>, ties, kPowers> channel_terms(const InputGradient<T>& p, int64_t n,
                                                                        int64_t c) {
  using A = Compute<T>;
  const A* descriptor = p.descriptors + n * p.pool.count() * p.channels + c;
  const A* branch_grad = p.branches_grad + n * p.grads * p.channels + c;
  const auto slope = [&] {
    const A value = load(branch_grad);
    return p.pool.light ? A(0.5) * value : value;
  };
  const auto next = [&] {
    descriptor += p.channels;
    if (p.grads > 1) branch_grad += p.channels;
  };
  ChannelTerms<A, ties, kPowers> terms = {};
  terms.gate = load(p.channel_gate + n * p.channels + c);
  terms.max = MaximumGrad<A, ties>::none();
  if (p.pool.avg) {
    terms.offset = slope() / A(p.pixels);
    next();
  }
  if (p.pool.max) {
    terms.max.grad = slope();
    const int32_t tie = load(p.pixel_ties + n * p.channels + c);
    if constexpr (ties == Ties::kEven) {
      share_evenly(tie, terms.max.grad, terms.offset);
      terms.max.key = load(descriptor);
    } else {
      terms.max.key = tie;
    }
    next();
  }
  if constexpr (kPowers) {
    if (p.pool.lp) {
      const A norm = load(descriptor);
      terms.lp_slope = norm == A(0) ? A(0) : slope() / norm;
      next();
    }
    if (p.pool.lse) {
      terms.lse_slope = slope();
      terms.lse = load(descriptor);
    }
  }
  return terms;
}

// The terms of pixel i of sample n.
template <Ties ties, class T>
__device__ inline PixelTerms<Compute<T>, ties> pixel_terms(const InputGradient<T>& p, const Affine<Compute<T>>& norm,
                                                           int64_t n, int64_t i) {
  using A = Compute<T>;
  if (!p.logits) return {A(1), {A(0), MaximumGrad<A, ties>::none()}};
  const A* grads = p.pixel_grads + 2 * n * p.pixels + i;
  PixelTerms<A, ties> terms = {};
  terms.gate = sigmoid(norm(load(p.logits + n * p.pixels + i)));
  terms.grad.mean = load(grads);
  terms.grad.max.grad = load(grads + p.pixels);
  if constexpr (ties == Ties::kFirst)
    terms.grad.max.key = load(p.channel_ties + n * p.pixels + i);
  else
    terms.grad.max.key = load(p.pooled + (2 * n + p.max_map) * p.pixels + i);
  return terms;
}

// dx at channel c and pixel i.
template <class A, Ties ties, bool kPowers>
__device__ inline A input_gradient(const Pool& pool, A grad, A x, const ChannelTerms<A, ties, kPowers>& channel,
                                   int32_t c, const PixelTerms<A, ties>& pixel, int32_t i) {
  A total = (grad * pixel.gate + pixel.grad.of(c, x * channel.gate)) * channel.gate + channel.offset;
  if (channel.max.is_at(i, x)) total += channel.max.grad;
  if constexpr (kPowers) {
    if (pool.lp) total += channel.lp_slope * x;
    if (pool.lse) total += channel.lse_slope * std::exp(x - channel.lse);
  }
  return total;
}

template <class T, bool kAligned, bool kChannelsLast, Ties ties, bool kPowers>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) input_gradient_kernel(InputGradient<T> p) {
  using A = Compute<T>;
  using Channel = ChannelTerms<A, ties, kPowers>;
  using Pixel = PixelTerms<A, ties>;
  using Row = std::conditional_t<kChannelsLast, Pixel, Channel>;
  using Column = std::conditional_t<kChannelsLast, Channel, Pixel>;
  constexpr int kWidth = kElements<T, kAligned>;
  constexpr int kUnroll = kAligned ? 2 : 4;
  constexpr bool kReadsX = ties == Ties::kEven || kPowers;
  SHARED_ARRAY(Row, rows, kMostTileRows);
  SHARED_ARRAY(Column, columns, kColumnSlots<T>);
  const Tile<T, kAligned> tile(p.tiling, {0, p.samples, true}, blockIdx.x);
  const int thread = int(threadIdx.x);
  {
    const Affine<A> norm(p.norm);
    const auto terms_of = [&](auto channels, int64_t i) {
      if constexpr (decltype(channels)::value)
        return channel_terms<ties, kPowers>(p, tile.sample, i);
      else
        return pixel_terms<ties>(p, norm, tile.sample, i);
    };
    for (int i = thread; i < tile.rows; i += kTileThreads)
      rows[i] = terms_of(std::bool_constant<!kChannelsLast>(), tile.first_row + i);
    for (int i = thread; i < tile.columns; i += kTileThreads)
      columns[tile.slot(i)] = terms_of(std::bool_constant<kChannelsLast>(), tile.first_column + i);
  }
  __syncthreads();

  Column own[kWidth] = {};
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (tile.column(i) < tile.columns) own[i] = columns[tile.slot(tile.column(i))];
  for (int first = tile.line; first < tile.rows; first += kUnroll * tile.lines) {
    Elements<T, kAligned> grad[kUnroll], x[kUnroll] = {};
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      grad[k] = tile.load_row(p.grad, first + k * tile.lines);
      if (kReadsX && p.x) x[k] = tile.load_row(p.x, first + k * tile.lines);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int row = first + k * tile.lines;
      if (row >= tile.rows) break;
      const Row terms = rows[row];
      Elements<T, kAligned> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A g = to_compute(grad[k].values[i]), value = to_compute(x[k].values[i]);
        const int32_t r = int32_t(tile.first_row) + row, c = int32_t(tile.first_column) + tile.column(i);
        if constexpr (kChannelsLast)
          result.values[i] = rounded<T>(input_gradient(p.pool, g, value, own[i], c, terms, r));
        else
          result.values[i] = rounded<T>(input_gradient(p.pool, g, value, terms, r, own[i], c));
      }
      tile.store_row(p.x_grad, row, result);
    }
  }
}

// Whether dx needs x itself.
inline bool reads_x(const Pool& pool, Ties ties, bool spatial) {
  return pool.lp || pool.lse || (ties == Ties::kEven && (pool.max || spatial));
}

template <class T>
void input_gradient_launch(const Stream& stream, const InputGradient<T>& p, bool channels_last, Ties ties) {
  const auto kernel = [&](auto aligned, auto last) {
    constexpr bool kAligned = decltype(aligned)::value, kLast = decltype(last)::value;
    const bool powers = p.pool.lp || p.pool.lse;
    if (ties == Ties::kEven) return input_gradient_kernel<T, kAligned, kLast, Ties::kEven, true>;
    return powers ? input_gradient_kernel<T, kAligned, kLast, Ties::kFirst, true>
                  : input_gradient_kernel<T, kAligned, kLast, Ties::kFirst, false>;
  };
  const auto with_alignment = [&](auto aligned) {
    return channels_last ? kernel(aligned, std::true_type()) : kernel(aligned, std::false_type());
  };
  const Tiling& t = p.tiling;
  launch(stream, "input_gradient", t.aligned ? with_alignment(std::true_type()) : with_alignment(std::false_type()),
         {p.samples * t.tiles(), kTileThreads}, p);
}

}  // namespace cbam_fused
