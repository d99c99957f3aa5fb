// cbam_apply: y = act(x * Mc * Ms + residual), Ms = sigmoid(norm(z)), or 1 without a spatial gate
// x, y, residual [N, C, H, W]; Mc [N, C]; z [N, H, W], or pools over channels that are convolved here to z.
// Traffic: x (and residual) once, y once.
//
// A block per tile of a sample's matrix. It first computes Ms of its pixels, the tile's columns in NCHW and its rows in
// channels_last; then each thread takes its elements of one row after the other.
#pragma once

#include "convolution.h"
#include "gate.h"
#include "launch.h"
#include "tile.h"

namespace cbam_fused {

enum class SpatialGate { kNone, kLogits, kPools };

template <class T>
struct Apply {
  using A = Compute<T>;

  const T* x;             // [N, rows, columns]
  const T* residual;      // as x, or null
  T* y;                   // as x, out
  const A* channel_gate;  // [N, C]
  SpatialGate gate;
  const A* logits;                          // [N, HW] if kLogits
  Convolution<A, Ties::kNone> convolution;  // if kPools
  NormParameters<A> norm;
  Activation<A> activation;
  Tiling tiling;  // set by tile(), as the next
  Samples samples;

  void tile(const Shape& shape) {
    // In NCHW tiles have twice the rows, because each block convolves for all of its rows.
    tiling = cbam_fused::tiling<T>(shape, shape.channels_last ? 1 : 2);
    samples = {0, shape.n, false};
    convolution.block_pixels = shape.channels_last ? tiling.tile_rows : tiling.tile_columns;
  }
  // Bytes of shared memory.
  size_t room() const { return gate == SpatialGate::kPools ? convolution.room() : 0; }
};

// What block `block` of apply does, with its room() of shared memory.
template <bool kAligned, bool kChannelsLast, class T>
__device__ inline void apply(const Apply<T>& p, Compute<T>* room, unsigned block) {
  using A = Compute<T>;
  constexpr int kCount = kElements<T, kAligned>, kRowsAtOnce = kAligned || sizeof(T) == 8 ? 4 : 8;
  SHARED_ARRAY(A, spatial_gate, kMostTileRows);
  const Tile<T, kAligned> tile(p.tiling, p.samples, block);
  const int thread = int(threadIdx.x);

  const int first_pixel = int(kChannelsLast ? tile.first_row : tile.first_column);
  const int64_t first_channel = kChannelsLast ? tile.first_column : tile.first_row;
  const int pixels = kChannelsLast ? tile.rows : tile.columns;
  const Affine<A> affine(p.norm);
  if (p.gate == SpatialGate::kPools) {
    p.convolution.run(tile.sample, first_pixel, pixels, kTileThreads, room,
                      [&](int i, A logit) { spatial_gate[i] = sigmoid(affine(logit)); });
  } else {
    const int64_t plane = kChannelsLast ? p.tiling.rows : p.tiling.columns;
    const A* logits = p.logits + tile.sample * plane + first_pixel;
    for (int i = thread; i < pixels; i += kTileThreads)
      spatial_gate[i] = p.gate == SpatialGate::kLogits ? sigmoid(affine(load(logits + i))) : A(1);
  }
  __syncthreads();

  const A* channel_gate =
      p.channel_gate + tile.sample * (kChannelsLast ? p.tiling.columns : p.tiling.rows) + first_channel;
  A column_gate[kCount];
  if constexpr (kChannelsLast) {
    load_factors<kAligned>(channel_gate, tile.column(0), tile.lanes, tile.columns, column_gate);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      column_gate[i] = tile.column(i) < tile.columns ? spatial_gate[tile.column(i)] : A(0);
  }
#pragma unroll 1
  for (int first = tile.line; first < tile.rows; first += kRowsAtOnce * tile.lines) {
    Elements<T, kAligned> x[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) x[k] = tile.load_row(p.x, first + k * tile.lines);
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int row = first + k * tile.lines;
      if (row >= tile.rows) break;
      Elements<T, kAligned> residual, y;  // several rows of the residual at once would fill the registers
      if (p.residual) residual = tile.load_row(p.residual, row);
      const A row_gate = kChannelsLast ? spatial_gate[row] : load(channel_gate + row);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        A value = to_compute(x[k].values[i]);
        value = kChannelsLast ? value * column_gate[i] * row_gate : value * row_gate * column_gate[i];
        if (p.residual) value += to_compute(residual.values[i]);
        y.values[i] = rounded<T>(activate(value, p.activation));
      }
      tile.store_row(p.y, row, y);
    }
  }
}

template <class T>
void apply_launch(const Stream& stream, Apply<T> p, const Shape& shape);

}  // namespace cbam_fused
