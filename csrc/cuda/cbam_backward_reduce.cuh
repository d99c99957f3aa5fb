// cbam_backward_reduce: the first pass of the backward. With g = grad through the activation and p = g x,
//   channel_sums[n, c] = sum_hw p Ms,   q[n, hw] = sum_c p Mc,   norm_grad = q Ms (1 - Ms),
//   norm_sums = sum norm_grad, sum norm_grad * normalised logits
// Traffic: grad and x once; with an activation also y once, and masked_grad written once.
//
// reduce_products: a block per tile leaves the sums along the rows and along the columns of the tile; in NCHW these are
// parts of channel_sums and q, in channels_last of q and channel_sums. finish_reduce: a thread per channel and per
// pixel adds the parts; add_norm_sums: one block adds what those of finish_reduce left of norm_sums.
#pragma once

#include "gate.h"
#include "tile.h"

namespace cbam_fused {

template <class T>
struct BackwardReduce {
  using A = Compute<T>;

  int64_t samples, channels, pixels;
  Tiling tiling;
  bool channels_last;

  const T* grad;          // as x
  const T* x;             // [N, rows, columns]
  const T* y;             // as x, or null without an activation
  T* masked_grad;         // as x, out; or null
  const A* channel_gate;  // [N, C]
  const A* logits;        // [N, HW], or null without a spatial gate
  NormParameters<A> norm;
  Activation<A> activation;

  A* row_parts;     // [N, column tiles, rows], out; null where not wanted, as the next
  A* column_parts;  // [N, row tiles, columns], out
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kTileThreads) reduce_products_kernel(BackwardReduce<T> p) {
  using A = Compute<T>;
  constexpr int kWidth = kElements<T, kAligned>;
  constexpr int kUnroll = kAligned ? 2 : 4;
  SHARED_ARRAY(A, row_weight, kMostTileRows);
  SHARED_ARRAY(A, column_weight, kColumnSlots<T>);
  SHARED_ARRAY(A, room, kRowEntries);
  const Tile<T, kAligned> tile(p.tiling, {0, p.samples, true}, blockIdx.x);
  const int thread = int(threadIdx.x);

  {
    const Affine<A> affine(p.norm);
    const auto channel_weight = [&](int64_t c) { return load(p.channel_gate + tile.sample * p.channels + c); };
    const auto pixel_weight = [&](int64_t i) {
      return p.logits ? sigmoid(affine(load(p.logits + tile.sample * p.pixels + i))) : A(1);
    };
    for (int i = thread; i < tile.rows; i += kTileThreads)
      row_weight[i] = p.channels_last ? pixel_weight(tile.first_row + i) : channel_weight(tile.first_row + i);
    for (int i = thread; i < tile.columns; i += kTileThreads)
      column_weight[tile.slot(i)] =
          p.channels_last ? channel_weight(tile.first_column + i) : pixel_weight(tile.first_column + i);
  }
  __syncthreads();

  A weights[kWidth], column_sums[kWidth] = {};
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    weights[i] = tile.column(i) < tile.columns ? column_weight[tile.slot(tile.column(i))] : A(0);
  const int pitch = row_pitch(tile.lanes);
  for (int first = tile.line; first < tile.rows; first += kUnroll * tile.lines) {
    Elements<T, kAligned> grad[kUnroll], x[kUnroll], y[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      grad[k] = tile.load_row(p.grad, first + k * tile.lines);
      x[k] = tile.load_row(p.x, first + k * tile.lines);
      if (p.y) y[k] = tile.load_row(p.y, first + k * tile.lines);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int row = first + k * tile.lines;
      if (row >= tile.rows) break;
      if (p.y) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const A value = to_compute(y[k].values[i]);
          if (value <= p.activation.lowest || value >= p.activation.highest) grad[k].values[i] = rounded<T>(A(0));
        }
        tile.store_row(p.masked_grad, row, grad[k]);
      }
      A row_sum = 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A product = to_compute(grad[k].values[i]) * to_compute(x[k].values[i]);
        row_sum = std::fma(product, weights[i], row_sum);
        column_sums[i] = std::fma(product, row_weight[row], column_sums[i]);
      }
      room[row * pitch + tile.lane] = row_sum;
    }
  }
  __syncthreads();
  if (p.row_parts) {
    A* target = p.row_parts + (tile.sample * p.tiling.column_tiles + tile.column_tile) * p.tiling.rows + tile.first_row;
    for (int row = thread; row < tile.rows; row += kTileThreads)
      store(target + row, sum_chains(room + row * pitch, tile.lanes, 1));
    __syncthreads();
  }
  if (p.column_parts) {
    A* target =
        p.column_parts + (tile.sample * p.tiling.row_tiles + tile.row_tile) * p.tiling.columns + tile.first_column;
    for_column_sums(tile, column_sums, room, [&](int column, A sum) { store(target + column, sum); });
  }
}

template <class A>
struct FinishReduce {
  int64_t samples, channels, pixels;
  int channel_blocks, pixel_blocks;  // of a sample; channel_blocks 0: channel_sums are there already
  int channel_tiles, pixel_tiles;    // how many parts there are of a channel's sum, and of a pixel's
  const A* channel_parts;            // [N, channel tiles, C]
  const A* pixel_parts;              // [N, pixel tiles, HW], or null without a spatial gate, as what follows
  const A* logits;                   // [N, HW]
  NormParameters<A> norm;
  A* channel_sums;    // [N, C], out
  A* norm_grad;       // [N, HW], out
  A* norm_sum_parts;  // [2, N * pixel_blocks], out; null without a norm
};

// The blocks of a sample: channel_blocks, then pixel_blocks.
template <class A>
__global__ void __launch_bounds__(kTileThreads) finish_reduce_kernel(FinishReduce<A> p) {
  SHARED_ARRAY(A, room, 2 * kTileWarps);
  const unsigned block = blockIdx.x, blocks = unsigned(p.channel_blocks + p.pixel_blocks);
  const int64_t n = block / blocks;
  const int within = int(block % blocks), thread = int(threadIdx.x);
  if (within < p.channel_blocks) {
    const int64_t c = int64_t(within) * kTileThreads + thread;
    if (c >= p.channels) return;
    const A* parts = p.channel_parts + n * p.channel_tiles * p.channels + c;
    store(p.channel_sums + n * p.channels + c, sum_partials(parts, p.channel_tiles, p.channels));
    return;
  }
  const int pixel_block = within - p.channel_blocks;
  const int64_t i = int64_t(pixel_block) * kTileThreads + thread;
  A norm_grad = 0, normalised = 0;
  if (i < p.pixels) {
    const A* parts = p.pixel_parts + n * p.pixel_tiles * p.pixels + i;
    const A logit = load(p.logits + n * p.pixels + i), gate = sigmoid(Affine<A>(p.norm)(logit));
    norm_grad = sum_partials(parts, p.pixel_tiles, p.pixels) * (gate * (A(1) - gate));
    store(p.norm_grad + n * p.pixels + i, norm_grad);
    if (p.norm.mean) normalised = (logit - p.norm.mean[0]) * p.norm.inverse_deviation();
  }
  if (!p.norm_sum_parts) return;
  const A sum = block_sum(norm_grad, room), product_sum = block_sum(norm_grad * normalised, room + kTileWarps);
  if (thread > 0) return;
  A* target = p.norm_sum_parts + n * p.pixel_blocks + pixel_block;
  store(target, sum);
  store(target + p.samples * p.pixel_blocks, product_sum);
}

template <class A>
__global__ void __launch_bounds__(kTileThreads) add_norm_sums_kernel(const A* parts,  // [2, count]
                                                                     A* norm_sums,    // [2], out
                                                                     int64_t count) {
  SHARED_ARRAY(A, room, 2 * kTileWarps);
  const int thread = int(threadIdx.x);
  for (int i = 0; i < 2; ++i) {
    const int64_t own = thread < count ? ceil_div(count - thread, kTileThreads) : 0;
    const A sum = block_sum(sum_partials(parts + i * count + thread, own, kTileThreads), room + i * kTileWarps);
    if (thread == 0) store(norm_sums + i, sum);
  }
}

// How many numbers of scratch the launches need.
struct BackwardReduceScratch {
  int64_t row_parts, column_parts, norm_sum_parts;
};

inline BackwardReduceScratch backward_reduce_scratch(const Tiling& t, const Shape& s) {
  return {s.n * t.column_tiles * t.rows, s.n * t.row_tiles * t.columns, 2 * s.n * ceil_div(s.pixels(), kTileThreads)};
}

// p without row_parts and column_parts. channel_sums [N, C], norm_grad [N, HW] (null without a spatial gate), norm_sums
// [2] (null without a norm): out.
template <class T>
void backward_reduce_launch(const Stream& stream, BackwardReduce<T> p, Compute<T>* row_parts, Compute<T>* column_parts,
                            Compute<T>* norm_sum_parts, Compute<T>* channel_sums, Compute<T>* norm_grad,
                            Compute<T>* norm_sums) {
  using A = Compute<T>;
  const Tiling& t = p.tiling;
  const int channel_tiles = p.channels_last ? t.row_tiles : t.column_tiles;
  const int pixel_tiles = p.channels_last ? t.column_tiles : t.row_tiles;
  A*& channel_parts = p.channels_last ? p.column_parts : p.row_parts;
  A*& pixel_parts = p.channels_last ? p.row_parts : p.column_parts;
  p.row_parts = row_parts;
  p.column_parts = column_parts;
  if (channel_tiles == 1) channel_parts = channel_sums;
  if (!p.logits) pixel_parts = nullptr;
  launch(stream, "reduce_products", t.aligned ? reduce_products_kernel<T, true> : reduce_products_kernel<T, false>,
         {p.samples * t.tiles(), kTileThreads}, p);

  const bool with_norm = p.logits && p.norm.mean;
  const int channel_blocks = channel_tiles == 1 ? 0 : int(ceil_div(p.channels, kTileThreads));
  const int pixel_blocks = p.logits ? int(ceil_div(p.pixels, kTileThreads)) : 0;
  const FinishReduce<A> finish = {p.samples,    p.channels,
                                  p.pixels,     channel_blocks,
                                  pixel_blocks, channel_tiles,
                                  pixel_tiles,  channel_parts,
                                  pixel_parts,  p.logits,
                                  p.norm,       channel_sums,
                                  norm_grad,    with_norm ? norm_sum_parts : nullptr};
  launch(stream, "finish_reduce", finish_reduce_kernel<A>, {p.samples * (channel_blocks + pixel_blocks), kTileThreads},
         finish);
  if (with_norm)
    launch(stream, "add_norm_sums", add_norm_sums_kernel<A>, {1, kTileThreads}, norm_sum_parts, norm_sums,
           p.samples * pixel_blocks);
}

}  // namespace cbam_fused
