// The kernels of the CPU backend: what they do, and the table through which they are called.
//
// A sample is a matrix: NCHW has channels as rows and pixels as columns, channels_last pixels as rows and channels as
// columns. So one set of kernels serves both layouts natively. Each works on a part of one sample, so that the caller
// can spread samples, or parts of a sample, over threads; no result depends on how the parts are cut.
//
// kernels.cpp is compiled once for each capability (instruction set); dispatch.cpp chooses a table when first asked.
#pragma once

#include "../types.h"

namespace cbam_fused::cpu {

// Rows of a backward leaf: partial column sums are made for leaves of this many rows and added in ascending order.
constexpr int64_t kLeafRows = 32;

// Rows of a leaf of reduce_columns, counted from the last row: leaves can be reduced one by one and then merged.
constexpr int64_t kColumnLeafRows = 64;

// Per channel and per pixel terms of the input's gradient (cbam_backward_input.cpp).
template <class A>
struct InputGradientTerms {
  const A* channel_gate;         // [C]
  const A* channel_offset;       // [C] gradient of the average, per pixel
  const A* channel_max_grad;     // [C] gradient of the maximum (its share, for ties even)
  const int32_t* pixel_index;    // [C] where it goes (ties first)
  const A* channel_max;          // [C] the maximum (ties even)
  const A* channel_lp_grad;      // [C] times x; or null
  const A* channel_lse;          // [C] or null
  const A* channel_lse_grad;     // [C] times exp(x - lse)
  const A* spatial_gate;         // [HW]
  const A* pixel_offset;         // [HW] gradient of the mean map, per channel
  const A* pixel_max_grad;       // [HW] gradient of the max map (its share, for ties even)
  const int32_t* channel_index;  // [HW] where it goes (ties first)
  const A* pixel_max;            // [HW] the maximum of x * channel_gate (ties even)
};

template <class T>
struct Kernels {
  using A = Compute<T>;

  // Sum, maximum and its ties of rows [row_begin, row_end), times column_scale if given.
  void (*reduce_rows)(const T* x, int64_t columns, int64_t row_begin, int64_t row_end,
                      const A* column_scale,                     // [columns] or null
                      Ties ties, A* sum, A* max, int32_t* tie);  // [rows]
  // The same of columns [column_begin, column_end), times row_scale if given. Rows are read from last to first, so that
  // a pass by columns after one by rows (or the reverse) begins with what is still in the cache.
  void (*reduce_columns)(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                         const A* row_scale,                        // [rows] or null
                         Ties ties, A* sum, A* max, int32_t* tie);  // [columns]
  // What reduce_columns gives, to the bit, from its results for the leaves of the rows, each [leaves, columns], where
  // the first leaf has the last rows.
  void (*merge_leaves)(const A* sums, const A* maxima, const int32_t* leaf_ties, int64_t rows, int64_t columns,
                       int64_t column_begin, int64_t column_end, Ties ties, A* sum, A* max, int32_t* tie);
  // Sums of x^2, and of exp(x - center).
  void (*square_rows)(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, A* sum);
  void (*square_columns)(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end, A* sum);
  void (*exp_rows)(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, const A* center, A* sum);
  void (*exp_columns)(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                      const A* center, A* sum);

  // y = act(x * row * column + residual) for rows [row_begin, row_end); the channel's factor is applied first.
  void (*apply)(const T* x, const T* residual, T* y, int64_t columns, int64_t row_begin, int64_t row_end,
                const A* row_scale, const A* column_scale, bool rows_are_channels, bool descending,
                Activation<A> activation);

  // g = grad, masked where y is given (and written to masked_grad); p = g * x:
  // row_sums[row] = sum over columns of p * column_weight; column_sums[column] = sum over these rows of p * row_weight.
  // The rows are a leaf: row_begin is a multiple of kLeafRows and there are at most so many.
  void (*reduce_products)(const T* grad, const T* x, const T* y, T* masked_grad, int64_t columns, int64_t row_begin,
                          int64_t row_end, const A* row_weight, const A* column_weight, Activation<A> activation,
                          A* row_sums, A* column_sums);

  // sum over columns of x * (column_weight + [x * row_scale == column_max] * column_share); the second term only if
  // column_max is given.
  void (*weigh_rows)(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, const A* column_weight,
                     const A* row_scale, const A* column_max, const A* column_share, A* sum);
  void (*weigh_columns)(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                        const A* row_weight, const A* column_scale, const A* row_max, const A* row_share, A* sum);

  // dx for rows [row_begin, row_end); x is read only for ties even, lp and lse.
  void (*input_gradient)(const T* grad, const T* x, T* x_grad, int64_t columns, int64_t row_begin, int64_t row_end,
                         bool rows_are_channels, Ties ties, const InputGradientTerms<A>& terms);

  // The MLP, with weights in T. `vectors` inputs share each read of the weights.
  // out[v][row] = dot(weight[row], in[v]) for rows [row_begin, row_end), in [vectors, width], out [vectors, rows].
  void (*products)(const T* weight, int64_t rows, int64_t width, int64_t row_begin, int64_t row_end, const A* in,
                   int64_t vectors, A* out);
  // out[v] = sum over rows of in[v][row] * weight[row], for columns [column_begin, column_end).
  void (*transposed_products)(const T* weight, int64_t rows, int64_t width, int64_t column_begin, int64_t column_end,
                              const A* in, int64_t vectors, A* out);
  // grad[row] = sum over v of a[v][row] * b[v], for rows [row_begin, row_end); a [vectors, rows], b [vectors, width].
  void (*outer_products)(const A* a, const A* b, int64_t vectors, int64_t rows, int64_t width, int64_t row_begin,
                         int64_t row_end, T* grad);

  // out = sigmoid(scale * z + shift).
  void (*gate)(const A* z, int64_t count, A scale, A shift, A* out);
  // The convolution of `maps` zero-padded maps [maps, H + k - 1, W + k - 1], behind which one more vector can be read,
  // with weights [maps, k, k].
  void (*convolve)(const A* padded, int64_t maps, int64_t height, int64_t width, int64_t k, int64_t row_begin,
                   int64_t row_end, const A* weight, A bias, A* out);
  // weight_grad [maps, k, k] = the padded maps correlated with z_grad [H, W].
  void (*convolve_weight_grad)(const A* padded, int64_t maps, int64_t height, int64_t width, int64_t k, const A* z_grad,
                               A* weight_grad);
};

// The table for the best capability of this machine, or a lower one asked for with CBAM_FUSED_CPU_CAPABILITY.
template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels();
template <>
const Kernels<double>& kernels();
template <>
const Kernels<Half>& kernels();
template <>
const Kernels<BFloat16>& kernels();

// "baseline", "avx2" or "avx512".
const char* cpu_capability();

}  // namespace cbam_fused::cpu
