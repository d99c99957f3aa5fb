// The kernels' table for one capability. Compiled once for each, with CBAM_CPU_CAPABILITY naming it.
#include "kernels.h"

#include "elementwise.h"
#include "reduce.h"
#include "simd.h"
#include "small.h"
#include "term_sums.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

// Run-time choices become template arguments here.
template <class T>
void reduce_rows_any(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, const Compute<T>* column_scale,
                     Ties ties, Compute<T>* sum, Compute<T>* max, int32_t* tie) {
  const auto run = [&](auto kernel) { kernel(x, columns, row_begin, row_end, column_scale, sum, max, tie); };
  if (ties == Ties::kNone)
    return run(column_scale ? reduce_rows<T, Ties::kNone, true> : reduce_rows<T, Ties::kNone, false>);
  if (ties == Ties::kFirst)
    return run(column_scale ? reduce_rows<T, Ties::kFirst, true> : reduce_rows<T, Ties::kFirst, false>);
  run(column_scale ? reduce_rows<T, Ties::kEven, true> : reduce_rows<T, Ties::kEven, false>);
}

template <class T>
void reduce_columns_any(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                        const Compute<T>* row_scale, Ties ties, Compute<T>* sum, Compute<T>* max, int32_t* tie) {
  const auto run = [&](auto kernel) { kernel(x, rows, columns, column_begin, column_end, row_scale, sum, max, tie); };
  if (ties == Ties::kNone)
    return run(row_scale ? reduce_columns<T, Ties::kNone, true> : reduce_columns<T, Ties::kNone, false>);
  if (ties == Ties::kFirst)
    return run(row_scale ? reduce_columns<T, Ties::kFirst, true> : reduce_columns<T, Ties::kFirst, false>);
  run(row_scale ? reduce_columns<T, Ties::kEven, true> : reduce_columns<T, Ties::kEven, false>);
}

template <class A>
void merge_leaves_any(const A* sums, const A* maxima, const int32_t* leaf_ties, int64_t rows, int64_t columns,
                      int64_t column_begin, int64_t column_end, Ties ties, A* sum, A* max, int32_t* tie) {
  const auto kernel = ties == Ties::kNone    ? merge_leaves<A, Ties::kNone>
                      : ties == Ties::kFirst ? merge_leaves<A, Ties::kFirst>
                                             : merge_leaves<A, Ties::kEven>;
  kernel(sums, maxima, leaf_ties, rows, columns, column_begin, column_end, sum, max, tie);
}

template <class T>
void apply_any(const T* x, const T* residual, T* y, int64_t columns, int64_t row_begin, int64_t row_end,
               const Compute<T>* row_scale, const Compute<T>* column_scale, bool rows_are_channels, bool descending,
               Activation<Compute<T>> activation) {
  const auto choose = [&](auto channel_rows) {
    constexpr bool kRows = channel_rows.value;
    const bool active = activation.lowest == activation.lowest;
    if (residual) return active ? apply<T, kRows, true, true> : apply<T, kRows, true, false>;
    return active ? apply<T, kRows, false, true> : apply<T, kRows, false, false>;
  };
  const auto kernel = rows_are_channels ? choose(True()) : choose(False());
  kernel(x, residual, y, columns, row_begin, row_end, row_scale, column_scale, descending, activation);
}

template <class T>
void reduce_products_any(const T* grad, const T* x, const T* y, T* masked_grad, int64_t columns, int64_t row_begin,
                         int64_t row_end, const Compute<T>* row_weight, const Compute<T>* column_weight,
                         Activation<Compute<T>> activation, Compute<T>* row_sums, Compute<T>* column_sums) {
  const auto kernel = y ? reduce_products<T, true> : reduce_products<T, false>;
  kernel(grad, x, y, masked_grad, columns, row_begin, row_end, row_weight, column_weight, activation, row_sums,
         column_sums);
}

template <class T>
void input_gradient_any(const T* grad, const T* x, T* x_grad, int64_t columns, int64_t row_begin, int64_t row_end,
                        bool rows_are_channels, Ties ties, const InputGradientTerms<Compute<T>>& terms) {
  const auto kernel =
      ties == Ties::kEven
          ? (rows_are_channels ? input_gradient<T, true, Ties::kEven> : input_gradient<T, false, Ties::kEven>)
          : (rows_are_channels ? input_gradient<T, true, Ties::kFirst> : input_gradient<T, false, Ties::kFirst>);
  kernel(grad, x, x_grad, columns, row_begin, row_end, terms);
}

template <class T>
constexpr Kernels<T> table() {
  using A = Compute<T>;
  return {reduce_rows_any<T>,
          reduce_columns_any<T>,
          merge_leaves_any<Compute<T>>,
          square_rows<T>,
          square_columns<T>,
          exp_rows<T>,
          exp_columns<T>,
          apply_any<T>,
          reduce_products_any<T>,
          weigh_rows<T>,
          weigh_columns<T>,
          input_gradient_any<T>,
          products<T>,
          transposed_products<T>,
          outer_products<T>,
          gate<A>,
          convolve<A>,
          convolve_weight_grad<A>};
}

extern constexpr Kernels<float> kFloat = table<float>();
extern constexpr Kernels<double> kDouble = table<double>();
extern constexpr Kernels<Half> kHalf = table<Half>();
extern constexpr Kernels<BFloat16> kBFloat16 = table<BFloat16>();

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
