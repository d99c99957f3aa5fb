// The small part of the gate: the MLP, the sigmoid, and the convolution over the two pooled maps.
#pragma once

#include "reduce.h"

namespace cbam_fused::CBAM_CPU_CAPABILITY {

template <class T>
void products(const T* weight, int64_t rows, int64_t width, int64_t row_begin, int64_t row_end, const Compute<T>* in,
              int64_t vectors, Compute<T>* out) {
  using A = Compute<T>;
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t v = 0; v < vectors; ++v)
      out[v * rows + row] = sum_row(weight + row * width, width, [&](const Vector<A>& w, int64_t j, int64_t count) {
        return w * load_some(in + v * width + j, count);
      });
}

// Tiles are small enough that a group of weight rows stays in the L1 cache while all vectors use it.
template <class T>
void transposed_products(const T* weight, int64_t rows, int64_t width, int64_t column_begin, int64_t column_end,
                         const Compute<T>* in, int64_t vectors, Compute<T>* out) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes, kTile = 512;
  for (int64_t tile = column_begin; tile < column_end; tile += kTile) {
    const int64_t tile_end = tile + kTile < column_end ? tile + kTile : column_end;
    for (int64_t row = 0; row < rows; row += kGroupRows)
      for (int64_t v = 0; v < vectors; ++v)
        for_vectors<kLanes>(tile, tile_end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          A* target = out + v * width + j;
          Vector<A> group[kGroupRows] = {};
          for (int64_t k = 0; k < kGroupRows; ++k) {
            if (row + k >= rows) break;
            group[k] = load_some(weight + (row + k) * width + j, count) * broadcast(in[v * rows + row + k]);
          }
          const Vector<A> total = row == 0 ? Vector<A>{} : load_some(target, count);
          store_some(target, total + tree_sum(group), count);
        });
  }
}

template <class T>
void outer_products(const Compute<T>* a, const Compute<T>* b, int64_t vectors, int64_t rows, int64_t width,
                    int64_t row_begin, int64_t row_end, T* grad) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes;
  for (int64_t row = row_begin; row < row_end; ++row)
    for_vectors<kLanes>(0, width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Vector<A> total = {};
      for (int64_t v = 0; v < vectors; ++v)
        total = total + broadcast(a[v * rows + row]) * load_some(b + v * width + j, count);
      store_some(grad + row * width + j, total, count);
    });
}

template <class A>
void gate(const A* z, int64_t count, A scale, A shift, A* out) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  for_vectors<kLanes>(0, count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_some(out + i, sigmoid(load_some(z + i, n) * broadcast(scale) + broadcast(shift)), n);
  });
}

// out [H, W]; the padded maps may be read up to one vector beyond their end.
template <class A>
void convolve(const A* padded, int64_t maps, int64_t height, int64_t width, int64_t k, const A* weight, A bias,
              A* out) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  constexpr int64_t kRows = 4;
  const int64_t pitch = width + k - 1, map_size = (height + k - 1) * pitch;
  for (int64_t y = 0; y < height; y += kRows) {
    const int64_t rows = height - y < kRows ? height - y : kRows;
    for (int64_t column = 0; column < width; column += kLanes) {
      Vector<A> sums[kRows];
      for (auto& sum : sums) sum = broadcast(bias);
      for (int64_t tap = 0; tap < maps * k * k; ++tap) {
        const int64_t m = tap / (k * k), ky = tap / k % k, kx = tap % k;
        const Vector<A> w = broadcast(weight[tap]);
        const A* source = padded + m * map_size + (y + ky) * pitch + column + kx;
        for (int64_t r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          sums[r] = sums[r] + w * load(source + r * pitch);
        }
      }
      const int64_t count = width - column < kLanes ? width - column : kLanes;
      for (int64_t r = 0; r < rows; ++r) store_some(out + (y + r) * width + column, sums[r], count);
    }
  }
}

template <class A>
void convolve_weight_grad(const A* padded, int64_t maps, int64_t height, int64_t width, int64_t k, const A* z_grad,
                          A* weight_grad) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  constexpr int64_t kTaps = 8;
  const int64_t pitch = width + k - 1, map_size = (height + k - 1) * pitch;
  for (int64_t line = 0; line < maps * k; ++line) {
    const A* source = padded + line / k * map_size + line % k * pitch;
    for (int64_t kx = 0; kx < k; kx += kTaps) {
      const int64_t taps = k - kx < kTaps ? k - kx : kTaps;
      Vector<A> sums[kTaps] = {};
      for (int64_t y = 0; y < height; ++y)
        for_vectors<kLanes>(0, width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          const Vector<A> g = load_some(z_grad + y * width + j, count);
          for (int64_t t = 0; t < kTaps; ++t) {
            if (t >= taps) break;
            sums[t] = sums[t] + g * load_some(source + y * pitch + j + kx + t, count);
          }
        });
      for (int64_t t = 0; t < taps; ++t) weight_grad[line * k + kx + t] = sum_of(sums[t]);
    }
  }
}

}  // namespace cbam_fused::CBAM_CPU_CAPABILITY
