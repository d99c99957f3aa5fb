// The forward passes over one sample, or a part of one, shared by cbam_inference, cbam_attend and cbam_apply.
//
// A pass reads x once. Passes over the same sample alternate their direction (kernels.h), so that each begins with what
// the last one left in the cache.
#pragma once

#include <utility>

#include "kernels.h"
#include "parallel.h"
#include "parameters.h"

namespace cbam_fused::cpu {

// Where the channel gate's intermediate results go, for all samples.
template <class A>
struct ChannelResults {
  A* descriptors;       // [N, P, C]
  A* hidden;            // [N, B, R]
  A* channel_gate;      // [N, C]
  int32_t* pixel_ties;  // [N, C] or null
};

// The sum and maximum of each column of a sample's matrix. With `spread` threads take leaves of rows, which are then in
// their caches for passes over rows; or columns, where there are fewer leaves than threads.
template <class T>
void reduce_columns(const Shape& s, const T* source, bool spread, const Compute<T>* row_scale, Ties ties,
                    Compute<T>* sum, Compute<T>* max, int32_t* tie) {
  using A = Compute<T>;
  const Kernels<T>& k = kernels<T>();
  const int64_t rows = s.rows(), columns = s.columns(), leaves = (rows + kColumnLeafRows - 1) / kColumnLeafRows;
  if (!spread || leaves < torch::stable::get_num_threads()) {
    for_blocks(spread, columns, kColumnBlock, rows, [&](int64_t begin, int64_t end) {
      k.reduce_columns(source, rows, columns, begin, end, row_scale, ties, sum, max, tie);
    });
    return;
  }
  const auto sums = scratch<A>(leaves * columns), maxima = scratch<A>(leaves * columns);
  const auto leaf_ties = scratch<int32_t>(ties == Ties::kNone ? 0 : leaves * columns);
  for_blocks(true, leaves, 1, kColumnLeafRows * columns, [&](int64_t from, int64_t to) {
    for (int64_t leaf = leaves - to; leaf < leaves - from; ++leaf) {  // the first thread's are the first rows
      const int64_t end = rows - leaf * kColumnLeafRows, begin = std::max<int64_t>(0, end - kColumnLeafRows);
      const int64_t at = leaf * columns;
      k.reduce_columns(source + begin * columns, end - begin, columns, 0, columns,
                       row_scale ? row_scale + begin : nullptr, ties, &sums[at], &maxima[at],
                       ties == Ties::kNone ? nullptr : &leaf_ties[at]);
    }
  });
  for_blocks(true, columns, kColumnBlock, leaves, [&](int64_t begin, int64_t end) {
    k.merge_leaves(sums.get(), maxima.get(), leaf_ties.get(), rows, columns, begin, end, ties, sum, max, tie);
  });
}

// Pools the channels of sample n over its pixels into the descriptors; with `spread` on all threads.
template <class T>
void pool_pixels(const Shape& s, const T* x, int64_t n, bool spread, const Pool& pool, Ties ties,
                 const ChannelResults<Compute<T>>& out) {
  using A = Compute<T>;
  const Kernels<T>& k = kernels<T>();
  const T* source = x + n * s.sample();
  const auto spare = scratch<A>(pool.avg && pool.max ? 0 : 2 * s.c);
  A* next = out.descriptors + n * pool.count() * s.c;
  const auto take = [&](bool wanted, A* otherwise) { return wanted ? std::exchange(next, next + s.c) : otherwise; };
  A* avg = take(pool.avg, spare.get());
  A* max = take(pool.max, spare.get() + s.c);
  int32_t* tie = out.pixel_ties && pool.max ? out.pixel_ties + n * s.c : nullptr;
  if (!tie) ties = Ties::kNone;

  const auto for_channels = [&](const auto& f) {
    for_blocks(spread, s.c, s.channels_last ? kColumnBlock : 1, s.pixels(), f);
  };
  if (s.channels_last)
    reduce_columns(s, source, spread, nullptr, ties, avg, max, tie);
  else
    for_channels([&](int64_t begin, int64_t end) {
      k.reduce_rows(source, s.columns(), begin, end, nullptr, ties, avg, max, tie);
    });
  for (int64_t c = 0; c < s.c; ++c) avg[c] /= A(s.pixels());

  if (pool.lp) {
    A* lp = take(true, nullptr);
    for_channels([&](int64_t begin, int64_t end) {
      if (s.channels_last)
        k.square_columns(source, s.rows(), s.columns(), begin, end, lp);
      else
        k.square_rows(source, s.columns(), begin, end, lp);
      for (int64_t c = begin; c < end; ++c) lp[c] = std::sqrt(lp[c]);
    });
  }
  if (pool.lse) {
    A* lse = take(true, nullptr);
    for_channels([&](int64_t begin, int64_t end) {
      if (s.channels_last)
        k.exp_columns(source, s.rows(), s.columns(), begin, end, max, lse);
      else
        k.exp_rows(source, s.columns(), begin, end, max, lse);
      for (int64_t c = begin; c < end; ++c) lse[c] = std::log(lse[c]) + max[c];
    });
  }
}

// The MLP and its sigmoid for samples [begin, end): descriptors -> hidden -> channel_gate. With `spread`, the rows of
// both layers are spread over the threads.
template <class W>
void channel_gate(const Shape& s, const Mlp<W>& mlp, const Pool& pool, int64_t begin, int64_t end, bool spread,
                  const ChannelResults<Compute<W>>& out) {
  using A = Compute<W>;
  const Kernels<W>& k = kernels<W>();
  const int64_t samples = end - begin, branches = pool.branches(), reduced = mlp.reduced();
  std::vector<A> own_inputs, own_sums;
  const A* inputs = mlp_inputs(out.descriptors + begin * pool.count() * s.c, pool.light, samples, s.c, own_inputs);
  const A* last = inputs;
  int64_t width = s.c;
  if (mlp.weight1) {
    A* hidden = out.hidden + begin * branches * reduced;
    for_blocks(spread, reduced, 1, s.c, [&](int64_t from, int64_t to) {
      k.products(data<W>(mlp.weight1), reduced, s.c, from, to, inputs, samples * branches, hidden);
      for (int64_t v = 0; v < samples * branches; ++v)
        for (int64_t r = from; r < to; ++r) {
          A& h = hidden[v * reduced + r];
          if (!mlp.bias1.empty()) h += mlp.bias1[r];
          h = h <= A(0) ? A(0) : h;
        }
    });
    last = hidden;
    width = reduced;
  }
  last = sum_branches(last, samples, branches, width, own_sums);
  A* gate = out.channel_gate + begin * s.c;
  for_blocks(spread, s.c, 1, width, [&](int64_t from, int64_t to) {
    k.products(data<W>(mlp.weight2), s.c, width, from, to, last, samples, gate);
    for (int64_t i = 0; i < samples; ++i) {
      A* sample_gate = gate + i * s.c;
      if (!mlp.bias2.empty())
        for (int64_t c = from; c < to; ++c) sample_gate[c] += A(branches) * mlp.bias2[c];
      k.gate(sample_gate + from, to - from, A(1), A(0), sample_gate + from);
    }
  });
}

// Pools the pixels of sample n over its channels: max and mean of x * channel_gate, [HW] each; with `spread` on all
// threads.
template <class T>
void pool_channels(const Shape& s, const T* x, int64_t n, bool spread, const Compute<T>* channel_gate, Ties ties,
                   Compute<T>* max, Compute<T>* mean, int32_t* tie) {
  const T* source = x + n * s.sample();
  if (s.channels_last)
    for_blocks(spread, s.pixels(), 1, s.c, [&](int64_t begin, int64_t end) {
      kernels<T>().reduce_rows(source, s.columns(), begin, end, channel_gate, ties, mean, max, tie);
    });
  else
    reduce_columns(s, source, spread, channel_gate, ties, mean, max, tie);
  for (int64_t i = 0; i < s.pixels(); ++i) mean[i] /= Compute<T>(s.c);
}

// The convolution of the spatial gate, k x k over `maps` maps, with its padded copy of them.
template <class A>
class Convolution {
 public:
  Convolution(const Shape& s, int64_t maps, int64_t k)
      : shape_(s), maps_(maps), k_(k), padded_(maps * size() + kSlack) {}

  // Copies a map [H, W] into the padded maps as map `index`, times `factor`, over or added to what is there.
  void set_map(int64_t index, const A* map, A factor = 1, bool add = false) {
    const int64_t pitch = shape_.w + k_ - 1, pad = k_ / 2;
    for (int64_t y = 0; y < shape_.h; ++y) {
      A* row = padded_.data() + index * size() + (y + pad) * pitch + pad;
      for (int64_t i = 0; i < shape_.w; ++i)
        row[i] = add ? row[i] + factor * map[y * shape_.w + i] : factor * map[y * shape_.w + i];
    }
  }
  // The pooled maps [2, H, W] as the convolution sees them: both, or half their sum.
  void set_pooled(const A* pooled) {
    if (maps_ == 1) {
      set_map(0, pooled, A(0.5));
      set_map(0, pooled + shape_.pixels(), A(0.5), true);
    } else {
      set_map(0, pooled);
      set_map(1, pooled + shape_.pixels());
    }
  }
  void run(const A* weight, A bias, A* out, bool spread = false) const {
    for_blocks(spread, shape_.h, kRows, shape_.w * maps_ * k_ * k_, [&](int64_t begin, int64_t end) {
      table().convolve(padded_.data(), maps_, shape_.h, shape_.w, k_, begin, end, weight, bias, out);
    });
  }
  void weight_grad(const A* z_grad, A* out) const {
    table().convolve_weight_grad(padded_.data(), maps_, shape_.h, shape_.w, k_, z_grad, out);
  }

 private:
  static constexpr int64_t kSlack = 64, kRows = 4;  // rows that the kernel computes together
  static const Kernels<A>& table() { return kernels<A>(); }
  int64_t size() const { return (shape_.h + k_ - 1) * (shape_.w + k_ - 1); }

  Shape shape_;
  int64_t maps_, k_;
  std::vector<A> padded_;
};

// y for rows [begin, end) of sample n's matrix.
template <class T>
void apply_rows(const Shape& s, const T* x, const T* residual, T* y, int64_t n, int64_t begin, int64_t end,
                const Compute<T>* channel_gate, const Compute<T>* spatial_gate, Activation<Compute<T>> activation) {
  const int64_t offset = n * s.sample();
  // Passes before this one ended at the first row by columns (NCHW), at the last by rows (channels_last).
  kernels<T>().apply(x + offset, residual ? residual + offset : nullptr, y + offset, s.columns(), begin, end,
                     s.channels_last ? spatial_gate : channel_gate, s.channels_last ? channel_gate : spatial_gate,
                     !s.channels_last, s.channels_last, activation);
}

}  // namespace cbam_fused::cpu
