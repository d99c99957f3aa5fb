// The small part of the gate: the MLP, the sigmoid, and the convolution over the two pooled maps.
#pragma once

#include "reduce.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

// The dot products of kRows rows of weights with kVectors inputs: each value read serves several of them. All are
// summed in the same order whatever their number. out[v * out_stride + r].
template <class T, int kRows, int kVectors>
inline void dot_rows(const T* weight, int64_t width, const Compute<T>* in, Compute<T>* out, int64_t out_stride) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes;
  Vector<A> totals[kVectors][kRows] = {};
  for (int64_t begin = 0; begin < width; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < width ? begin + kBlockColumns : width;
    Vector<A> sums[kVectors][kRows] = {};
    for_vectors<kLanes>(begin, end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Vector<A> w[kRows];
      for (int r = 0; r < kRows; ++r) w[r] = load_some(weight + r * width + j, count);
      for (int v = 0; v < kVectors; ++v) {
        const Vector<A> value = load_some(in + v * width + j, count);
        for (int r = 0; r < kRows; ++r) sums[v][r] = multiply_add(w[r], value, sums[v][r]);
      }
    });
    for (int v = 0; v < kVectors; ++v)
      for (int r = 0; r < kRows; ++r) totals[v][r] = totals[v][r] + sums[v][r];
  }
  A sums[kVectors * kRows];
  if constexpr (kVectors * kRows % kFolded == 0)
    for (int i = 0; i < kVectors * kRows; i += kFolded) sums_of(totals[0] + i, sums + i);
  else
    for (int i = 0; i < kVectors * kRows; ++i) sums[i] = sum_of(totals[0][i]);
  for (int v = 0; v < kVectors; ++v)
    for (int r = 0; r < kRows; ++r) out[v * out_stride + r] = sums[v * kRows + r];
}

template <class T>
void products(const T* weight, int64_t rows, int64_t width, int64_t row_begin, int64_t row_end, const Compute<T>* in,
              int64_t vectors, Compute<T>* out) {
  int64_t row = row_begin;
  for (; row + 8 <= row_end; row += 8) {
    const T* w = weight + row * width;
    int64_t v = 0;
    const auto run = [&](auto kernel, int together, int step) {
      for (; v + together <= vectors; v += together)
        for (int r = 0; r < 8; r += step) kernel(w + r * width, width, in + v * width, out + v * rows + row + r, rows);
    };
    run(dot_rows<T, 4, 4>, 4, 4);
    run(dot_rows<T, 4, 2>, 2, 4);
    run(dot_rows<T, 8, 1>, 1, 8);
  }
  for (; row < row_end; ++row)
    for (int64_t v = 0; v < vectors; ++v)
      dot_rows<T, 1, 1>(weight + row * width, width, in + v * width, out + v * rows + row, rows);
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
  constexpr int64_t kLanes = Vector<A>::kLanes, kRows = 4;
  for (int64_t row = row_begin; row < row_end; row += kRows) {
    const int64_t together = row_end - row < kRows ? row_end - row : kRows;
    const auto group = [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
      Vector<A> totals[kRows] = {};
      for (int64_t v = 0; v < vectors; ++v) {
        const Vector<A> input = load_some(b + v * width + j, count);
        for (int64_t k = 0; k < kRows; ++k) {
          if (!whole.value && k >= together) break;
          totals[k] = multiply_add(broadcast(a[v * rows + row + k]), input, totals[k]);
        }
      }
      for (int64_t k = 0; k < kRows; ++k) {
        if (!whole.value && k >= together) break;
        store_some(grad + (row + k) * width + j, totals[k], count);
      }
    };
    for_groups<kLanes>(together == kRows, 0, width, group);
  }
}

template <class A>
void gate(const A* z, int64_t count, A scale, A shift, A* out) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  for_vectors<kLanes>(0, count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_some(out + i, sigmoid(load_some(z + i, n) * broadcast(scale) + broadcast(shift)), n);
  });
}

// Rows [row_begin, row_end) of out [H, W]; the padded maps may be read up to one vector beyond their end. Each vector
// of the maps is read once for all the rows of `out` that it enters. A row of weights is summed by itself, then added.
template <int kRows, class A>
inline void convolve_rows(const A* padded, int64_t maps, int64_t height, int64_t width, int64_t k, int64_t y,
                          const A* weight, A bias, A* out) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const int64_t pitch = width + k - 1, map_size = (height + k - 1) * pitch;
  for (int64_t column = 0; column < width; column += kLanes) {
    Vector<A> sums[kRows];
    for (auto& sum : sums) sum = broadcast(bias);
    for (int64_t m = 0; m < maps; ++m)
      for (int64_t line = 0; line < kRows + k - 1; ++line) {
        const A* source = padded + m * map_size + (y + line) * pitch + column;
        Vector<A> lines[kRows] = {};
        for (int64_t kx = 0; kx < k; ++kx) {
          const Vector<A> v = load(source + kx);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            if (uint64_t(line - r) < uint64_t(k))
              lines[r] = multiply_add(broadcast(weight[(m * k + line - r) * k + kx]), v, lines[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          if (uint64_t(line - r) < uint64_t(k)) sums[r] = sums[r] + lines[r];
      }
    const int64_t count = width - column < kLanes ? width - column : kLanes;
    for (int r = 0; r < kRows; ++r) store_some(out + (y + r) * width + column, sums[r], count);
  }
}

template <class A>
void convolve(const A* padded, int64_t maps, int64_t height, int64_t width, int64_t k, int64_t row_begin,
              int64_t row_end, const A* weight, A bias, A* out) {
  constexpr int kRows = 4;
  int64_t y = row_begin;
  for (; y + kRows <= row_end; y += kRows) convolve_rows<kRows>(padded, maps, height, width, k, y, weight, bias, out);
  for (; y < row_end; ++y) convolve_rows<1>(padded, maps, height, width, k, y, weight, bias, out);
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
            sums[t] = multiply_add(g, load_some(source + y * pitch + j + kx + t, count), sums[t]);
          }
        });
      for (int64_t t = 0; t < taps; ++t) weight_grad[line * k + kx + t] = sum_of(sums[t]);
    }
  }
}

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
