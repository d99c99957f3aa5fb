// maps_backward: the backward of norm, convolution and pooled maps, and the channel gate's gradient through them. With
// dz the gradient of the logits, ds_mean and ds_max those of the maps, share_c this channel's part of the maximum:
//   a[n, c, hw] = ds_mean / C + ds_max share_c        channel_parts[n, c] = sum_hw x a, in parts
// Traffic: x once.
//
// A block per tile of x makes the maps' gradients of its pixels, and then its part of the channels' sums. The gradients
// are made again for every tile of the same pixels, of which the first leaves them for input_gradient and makes a part
// of the convolution's gradients: so tiles have many channels where that leaves enough blocks.
#pragma once

#include <algorithm>

#include "convolution_backward.h"
#include "maximum_backward.h"

namespace cbam_fused {

template <class T>
struct MapsBackward {
  using A = Compute<T>;

  int64_t samples, channels;
  Tiling tiling;
  ConvolutionBackward<A> convolution;

  const T* x;                   // [N, rows, columns]
  const A* channel_gate;        // [N, C]
  const int32_t* channel_ties;  // [N, HW]
  A* pixel_grads;               // [N, 2, HW], out: ds_mean / C, and ds_max of each maximum
  A* channel_parts;             // [N, pixel tiles, C], out
};

// Blocks that a multiprocessor holds at least. The compiler would give the kernel so few registers that some spill;
// three blocks leave too few where a thread has the gradients of eight pixels, or numbers of two registers.
template <class T, bool kChannelsLast>
constexpr int kMapsBlocks = sizeof(T) == 4 || (sizeof(T) == 2 && kChannelsLast) ? 3 : kTileBlocks;

template <class T, bool kAligned, bool kChannelsLast, Ties ties>
__global__ void __launch_bounds__(kTileThreads, kMapsBlocks<T, kChannelsLast>) maps_backward_kernel(MapsBackward<T> p) {
  using A = Compute<T>;
  constexpr int kWidth = kElements<T, kAligned>;
  constexpr int kUnroll = 4;
  using Grad = PixelGrad<A, ties>;
  SHARED_ARRAY(Grad, pixel_grads, kChannelsLast ? kMostTileRows : kColumnSlots<T>);
  DYNAMIC_SHARED(A, room);
  const Tile<T, kAligned> tile(p.tiling, {0, p.samples, false}, blockIdx.x);
  const int thread = int(threadIdx.x);
  const int64_t pixels = p.convolution.pixels();
  const int first_pixel = int(kChannelsLast ? tile.first_row : tile.first_column);
  const int first_channel = int(kChannelsLast ? tile.first_column : tile.first_row);
  const int pixel_tiles = kChannelsLast ? p.tiling.row_tiles : p.tiling.column_tiles;
  const int64_t part = tile.sample * pixel_tiles + (kChannelsLast ? tile.row_tile : tile.column_tile);
  const bool first_of_pixels = (kChannelsLast ? tile.column_tile : tile.row_tile) == 0;

  const auto finish_pixel = [&](int i, A first_grad, A second_grad) {
    const int64_t maps = tile.sample * 2 * pixels + first_pixel + i;
    const int32_t tie = load(p.channel_ties + tile.sample * pixels + first_pixel + i);
    const bool max_first = p.convolution.maps.max == 0;
    Grad grad = {(max_first ? second_grad : first_grad) / A(p.channels), {max_first ? first_grad : second_grad, {}}};
    if constexpr (ties == Ties::kEven) {
      share_evenly(tie, grad.max.grad, grad.mean);
      grad.max.key = load(p.convolution.pooled + maps + p.convolution.maps.max * pixels);
    } else {
      grad.max.key = tie;
    }
    pixel_grads[kChannelsLast ? i : tile.slot(i)] = grad;
    if (!first_of_pixels) return;
    store(p.pixel_grads + maps, grad.mean);
    store(p.pixel_grads + maps + pixels, grad.max.grad);
  };
  convolution_backward(p.convolution, tile.sample, first_pixel, kChannelsLast ? tile.rows : tile.columns,
                       first_of_pixels ? part : -1, room, finish_pixel);
  __syncthreads();

  const auto channel_gate = [&](int c) {
    return ties == Ties::kEven && c < p.channels ? load(p.channel_gate + tile.sample * p.channels + c) : A(0);
  };
  A* const sums = p.channel_parts + part * p.channels + first_channel;
  if constexpr (kChannelsLast) {
    A gates[kWidth], column_sums[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) gates[i] = channel_gate(first_channel + tile.column(i));
    for (int first = tile.line; first < tile.rows; first += kUnroll * tile.lines) {
      Elements<T, kAligned> x[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) x[k] = tile.load_row(p.x, first + k * tile.lines);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (first + k * tile.lines >= tile.rows) break;
        const Grad grad = pixel_grads[first + k * tile.lines];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const A value = to_compute(x[k].values[i]);
          column_sums[i] = std::fma(value, grad.of(first_channel + tile.column(i), value * gates[i]), column_sums[i]);
        }
      }
    }
    for_column_sums(tile, column_sums, room, [&](int column, A sum) { store(sums + column, sum); });
  } else {
    Grad grads[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      grads[i] = tile.column(i) < tile.columns ? pixel_grads[tile.slot(tile.column(i))]
                                               : Grad{A(0), MaximumGrad<A, ties>::none()};
    const int pitch = row_pitch(tile.lanes), step = rows_per_step(tile.lanes);
    for (int begin = 0; begin < tile.rows; begin += step) {
      const int end = tile.rows - begin < step ? tile.rows : begin + step;
      for (int first = begin + tile.line; first < end; first += kUnroll * tile.lines) {
        Elements<T, kAligned> x[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) x[k] = tile.load_row(p.x, first + k * tile.lines);
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
          const int row = first + k * tile.lines;
          if (row >= end) break;
          const A gate = channel_gate(first_channel + row);
          A sum = 0;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const A value = to_compute(x[k].values[i]);
            sum = std::fma(value, grads[i].of(first_channel + row, value * gate), sum);
          }
          room[(row - begin) * pitch + tile.lane] = sum;
        }
      }
      __syncthreads();
      for (int row = begin + thread; row < end; row += kTileThreads)
        store(sums + row, sum_chains(room + (row - begin) * pitch, tile.lanes, 1));
      __syncthreads();
    }
  }
}

// How x is divided: in channels_last into tiles as elsewhere; in NCHW a block goes through all channels of its pixels
// where a plane has many tiles, else through some hundreds.
template <class T>
Tiling maps_backward_tiling(const Shape& s) {
  if (s.channels_last) return tiling<T>(s);
  const Tiling whole = tiling<T>(s, 0);
  return whole.column_tiles >= 8 ? whole : tiling<T>(s, 2);
}

struct MapsBackwardScratch {
  int64_t pixel_tiles;  // of a sample; parts of the convolution's gradients: samples * pixel_tiles
  int64_t channel_parts;
};

inline MapsBackwardScratch maps_backward_scratch(const Tiling& t, const Shape& s) {
  const int64_t pixel_tiles = s.channels_last ? t.row_tiles : t.column_tiles;
  return {pixel_tiles, s.n * pixel_tiles * s.c};
}

template <class T>
void maps_backward_launch(const Stream& stream, MapsBackward<T> p, bool channels_last, Ties ties) {
  using A = Compute<T>;
  const Tiling& t = p.tiling;
  p.convolution.block_pixels = channels_last ? t.tile_rows : t.tile_columns;
  const int sums = channels_last ? kMostTileColumns<T> * kTileWarps : kRowEntries;
  const size_t shared = size_t(std::max(p.convolution.room(), sums)) * sizeof(A);
  const auto with_layout = [&](auto aligned, auto last) {
    constexpr bool kAligned = decltype(aligned)::value, kLast = decltype(last)::value;
    return ties == Ties::kFirst ? maps_backward_kernel<T, kAligned, kLast, Ties::kFirst>
                                : maps_backward_kernel<T, kAligned, kLast, Ties::kEven>;
  };
  const auto with_alignment = [&](auto aligned) {
    return channels_last ? with_layout(aligned, std::true_type()) : with_layout(aligned, std::false_type());
  };
  launch(stream, "maps_backward", t.aligned ? with_alignment(std::true_type()) : with_alignment(std::false_type()),
         {p.samples * t.tiles(), kTileThreads, shared}, p);
}

}  // namespace cbam_fused
