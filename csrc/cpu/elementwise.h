// Passes that write a tensor of x's size: the gated output, and the gradients.
#pragma once

#include "reduce.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

// v within the activation's bounds; NaN stays, and a NaN bound is none.
template <class A>
inline Vector<A> activate(const Vector<A>& v, const Activation<A>& activation) {
  const Vector<A> lowest = broadcast(activation.lowest), highest = broadcast(activation.highest);
  const Vector<A> raised = select(v, lowest, Less(), lowest, v);
  return select(raised, highest, Greater(), highest, raised);
}

template <class T, bool rows_are_channels, bool with_residual, bool active>
void apply(const T* x, const T* residual, T* y, int64_t columns, int64_t row_begin, int64_t row_end,
           const Compute<T>* row_scale, const Compute<T>* column_scale, bool descending,
           Activation<Compute<T>> activation) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes, kTile = ColumnValues<T>::kMost;
  const int64_t ahead = descending ? -(kPrefetch<T> + columns - 1) / columns * columns : kPrefetch<T>;
  for (int64_t tile = 0; tile < columns; tile += kTile) {
    const int64_t tile_end = tile + kTile < columns ? tile + kTile : columns;
    const ColumnValues<T> column_scales(column_scale + tile, tile_end - tile);
    for (int64_t step = row_begin; step < row_end; ++step) {
      const int64_t row = descending ? row_end - 1 - (step - row_begin) : step;
      const T* source = x + row * columns;
      const T* added = with_residual ? residual + row * columns : nullptr;
      T* target = y + row * columns;
      const A row_value = row_scale[row];
      const Vector<A> scale = broadcast(row_value == row_value ? row_value : A(__builtin_nan("")));
      const auto gated = [&](const Vector<A>& v, const Vector<A>& other, const Vector<A>& plus) {
        Vector<A> out = rows_are_channels ? v * scale * other : v * other * scale;
        if (with_residual) out = out + plus;
        return active ? activate(out, activation) : out;
      };
      int64_t begin = tile;
      for (; begin + 2 * kLanes <= tile_end; begin += 2 * kLanes) {
        const Pair<A> v = load_pair(source + begin), other = column_scales[begin - tile];
        const Pair<A> plus = with_residual ? load_pair(added + begin) : Pair<A>{};
        prefetch_write(target + begin, ahead);
        // Of NaN come only the default one and those of T, which end in zeros.
        store_pair(target + begin,
                   {{gated(v.part[0], other.part[0], plus.part[0]), gated(v.part[1], other.part[1], plus.part[1])}});
      }
      for_vectors<kLanes>(begin, tile_end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const Vector<A> plus = with_residual ? load_some(added + j, count) : Vector<A>{};
        store_some(target + j, gated(load_some(source + j, count), load_some(column_scale + j, count), plus), count);
      });
    }
  }
}

// grad where the activation let y through, else 0.
template <class A>
inline Vector<A> mask(const Vector<A>& grad, const Vector<A>& y, const Activation<A>& activation) {
  const Vector<A> zero = {};
  const Vector<A> raised = select(y, broadcast(activation.highest), GreaterEqual(), zero, grad);
  return select(y, broadcast(activation.lowest), LessEqual(), zero, raised);
}

template <class T, bool masked>
void reduce_products(const T* grad, const T* x, const T* y, T* masked_grad, int64_t columns, int64_t row_begin,
                     int64_t row_end, const Compute<T>* row_weight, const Compute<T>* column_weight,
                     Activation<Compute<T>> activation, Compute<T>* row_sums, Compute<T>* column_sums) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes, kRows = 4;
  double sums[kLeafRows] = {};
  for (int64_t tile = 0; tile < columns; tile += kBlockColumns) {
    const int64_t tile_end = tile + kBlockColumns < columns ? tile + kBlockColumns : columns;
    for (int64_t row = row_begin; row < row_end; row += kRows) {
      const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
      Vector<A> totals[kRows] = {};
      const auto group = [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
        const Vector<A> weight = load_some(column_weight + j, count);
        Vector<A> products[kRows] = {};
        for (int64_t k = 0; k < kRows; ++k) {
          if (!whole.value && k >= rows) break;
          const int64_t at = (row + k) * columns + j;
          Vector<A> g = load_some(grad + at, count);
          if (masked) {
            g = mask(g, load_some(y + at, count), activation);
            store_some(masked_grad + at, g, count);
          }
          const Vector<A> product = g * load_some(x + at, count);
          totals[k] = multiply_add(product, weight, totals[k]);
          products[k] = product * broadcast(row_weight[row + k]);
        }
        const Vector<A> before = row == row_begin ? Vector<A>{} : load_some(column_sums + j, count);
        const Vector<A> sum = (products[0] + products[1]) + (products[2] + products[3]);
        store_some(column_sums + j, before + sum, count);
      };
      for_groups<kLanes>(rows == kRows, tile, tile_end, group);
      for (int64_t k = 0; k < rows; ++k) sums[row - row_begin + k] += sum_of(totals[k]);
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) row_sums[row] = A(sums[row - row_begin]);
}

// dx = Mc (g Ms + offset_pixel + max_share) + offset_channel + max_share_channel (+ the lp and lse terms).
template <class T, bool rows_are_channels, Ties ties>
void input_gradient(const T* grad, const T* x, T* x_grad, int64_t columns, int64_t row_begin, int64_t row_end,
                    const InputGradientTerms<Compute<T>>& t) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = Vector<Index<A>>;
  constexpr int64_t kLanes = V::kLanes;
  const bool powers = t.channel_lp_grad || t.channel_lse;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const I this_row = broadcast(Index<A>(row));
    for_vectors<kLanes>(0, columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const auto channel = [&](const A* values) {
        return rows_are_channels ? broadcast(values[row]) : load_some(values + j, count);
      };
      const auto pixel = [&](const A* values) {
        return rows_are_channels ? load_some(values + j, count) : broadcast(values[row]);
      };
      const I these_columns = iota<Index<A>>() + broadcast(Index<A>(j));
      const I channels = rows_are_channels ? this_row : these_columns;
      const I pixels = rows_are_channels ? these_columns : this_row;
      const int64_t at = row * columns + j;
      const V gate = channel(t.channel_gate), zero = {};
      V du = multiply_add(load_some(grad + at, count), pixel(t.spatial_gate), pixel(t.pixel_offset));
      V direct = channel(t.channel_offset);
      if constexpr (ties == Ties::kFirst) {
        const I chosen_channel =
            rows_are_channels ? load_indices<A>(t.channel_index + j, count) : broadcast(Index<A>(t.channel_index[row]));
        const I chosen_pixel =
            rows_are_channels ? broadcast(Index<A>(t.pixel_index[row])) : load_indices<A>(t.pixel_index + j, count);
        du = du + select(chosen_channel, channels, Equal(), pixel(t.pixel_max_grad), zero);
        direct = direct + select(chosen_pixel, pixels, Equal(), channel(t.channel_max_grad), zero);
      } else {
        const V v = load_some(x + at, count);
        du = du + select(v * gate, pixel(t.pixel_max), Equal(), pixel(t.pixel_max_grad), zero);
        direct = direct + select(v, channel(t.channel_max), Equal(), channel(t.channel_max_grad), zero);
      }
      if (powers) {
        const V v = load_some(x + at, count);
        if (t.channel_lp_grad) direct = direct + v * channel(t.channel_lp_grad);
        if (t.channel_lse) direct = direct + exponential(v - channel(t.channel_lse)) * channel(t.channel_lse_grad);
      }
      store_some(x_grad + at, multiply_add(gate, du, direct), count);
    });
  }
}

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
