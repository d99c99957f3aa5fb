// Sums along the rows or the columns of a sample's matrix of a term made from each value: its square, its exponential,
// or its product with weights.
#pragma once

#include "reduce.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

// sum over a row of term(column vector, column).
template <class T, class F>
inline __attribute__((always_inline)) Compute<T> sum_row(const T* source, int64_t columns, F term) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes;
  Vector<A> total = {};
  for (int64_t begin = 0; begin < columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < columns ? begin + kBlockColumns : columns;
    Vector<A> even = {}, odd = {};
    int64_t j = begin;
    for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
      even = even + term(load(source + j), j, kLanes);
      odd = odd + term(load(source + j + kLanes), j + kLanes, kLanes);
    }
    for_vectors<kLanes>(j, end, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      const Vector<A> v = term(load_some(source + k, count), k, count);
      const Vector<Index<A>> lane = iota<Index<A>>();
      even = even + select(lane, broadcast(Index<A>(count)), Less(), v, Vector<A>{});
    });
    total = total + (even + odd);
  }
  return sum_of(total);
}

// sum over rows of term(column vector, row, column) for columns [column_begin, column_end).
template <class T, class F>
inline __attribute__((always_inline)) void sum_columns(const T* x, int64_t rows, int64_t columns, int64_t column_begin,
                                                       int64_t column_end, Compute<T>* sum, F term) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Vector<A>::kLanes;
  for (int64_t tile = column_begin; tile < column_end; tile += kTileColumns) {
    const int64_t tile_end = tile + kTileColumns < column_end ? tile + kTileColumns : column_end;
    ColumnSums<A> sums(sum, tile, tile_end);
    for (int64_t row = 0; row < rows; row += kGroupRows) {
      const auto group = [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
        Vector<A> v[kGroupRows] = {};
        for (int64_t k = 0; k < kGroupRows; ++k) {
          if (!whole.value && row + k >= rows) break;
          v[k] = term(load_some(x + (row + k) * columns + j, count), row + k, j, count);
        }
        sums.add(j, tree_sum(v), count);
      };
      for_groups<kLanes>(row + kGroupRows <= rows, tile, tile_end, group);
      sums.end_group(row + kGroupRows >= rows);
    }
  }
}

template <class T>
void square_rows(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, Compute<T>* sum) {
  for (int64_t row = row_begin; row < row_end; ++row)
    sum[row] = sum_row(x + row * columns, columns, [](const auto& v, int64_t, int64_t) { return v * v; });
}

template <class T>
void square_columns(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                    Compute<T>* sum) {
  sum_columns(x, rows, columns, column_begin, column_end, sum,
              [](const auto& v, int64_t, int64_t, int64_t) { return v * v; });
}

template <class T>
void exp_rows(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, const Compute<T>* center,
              Compute<T>* sum) {
  for (int64_t row = row_begin; row < row_end; ++row)
    sum[row] = sum_row(x + row * columns, columns,
                       [&](const auto& v, int64_t, int64_t) { return exponential(v - broadcast(center[row])); });
}

template <class T>
void exp_columns(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                 const Compute<T>* center, Compute<T>* sum) {
  sum_columns(x, rows, columns, column_begin, column_end, sum, [&](const auto& v, int64_t, int64_t j, int64_t count) {
    return exponential(v - load_some(center + j, count));
  });
}

template <class T>
void weigh_rows(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, const Compute<T>* column_weight,
                const Compute<T>* row_scale, const Compute<T>* column_max, const Compute<T>* column_share,
                Compute<T>* sum) {
  using A = Compute<T>;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* source = x + row * columns;
    if (!column_max) {
      sum[row] = sum_row(source, columns, [&](const Vector<A>& v, int64_t j, int64_t count) {
        return v * load_some(column_weight + j, count);
      });
      continue;
    }
    const Vector<A> scale = broadcast(row_scale[row]);
    sum[row] = sum_row(source, columns, [&](const Vector<A>& v, int64_t j, int64_t count) {
      const Vector<A> weight = load_some(column_weight + j, count);
      const Vector<A> shared = weight + load_some(column_share + j, count);
      return v * select(v * scale, load_some(column_max + j, count), Equal(), shared, weight);
    });
  }
}

template <class T>
void weigh_columns(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                   const Compute<T>* row_weight, const Compute<T>* column_scale, const Compute<T>* row_max,
                   const Compute<T>* row_share, Compute<T>* sum) {
  using A = Compute<T>;
  if (!row_max) {
    sum_columns(x, rows, columns, column_begin, column_end, sum,
                [&](const Vector<A>& v, int64_t row, int64_t, int64_t) { return v * broadcast(row_weight[row]); });
    return;
  }
  sum_columns(x, rows, columns, column_begin, column_end, sum,
              [&](const Vector<A>& v, int64_t row, int64_t j, int64_t count) {
                const Vector<A> weight = broadcast(row_weight[row]);
                const Vector<A> shared = broadcast(row_weight[row] + row_share[row]);
                const Vector<A> scale = load_some(column_scale + j, count);
                return v * select(v * scale, broadcast(row_max[row]), Equal(), shared, weight);
              });
}

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
