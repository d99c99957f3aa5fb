// Pooling of x over pixels, [N, parts, C], and of x * Mc over channels, [N, parts, HW], in either layout.
// Traffic: x once each. Pixels are pooled from the first sample to the last, channels from the last to the first: those
// are what the pass before left in the cache.
#pragma once

#include "reduce_columns.cuh"
#include "reduce_rows.cuh"

namespace cbam_fused {

template <class T>
int64_t pixel_parts(const Shape& shape) {
  return shape.channels_last ? column_parts(shape.pixels()) : row_order<T>(shape.pixels(), false).parts;
}
template <class T>
int64_t channel_parts(const Shape& shape) {
  return shape.channels_last ? row_order<T>(shape.c, true).parts : column_parts(shape.c);
}

template <Ties ties, class T>
void pool_pixels_launch(const Stream& stream, const Shape& shape,
                        const T* x,                               // [N, C, H, W]
                        const PartialPools<Compute<T>>& pools) {  // [N, parts, C], out
  const int64_t n = shape.n, rows = shape.rows(), columns = shape.columns();
  const auto launch = [&](auto all) {
    constexpr bool kAll = decltype(all)::value;
    if (shape.channels_last)
      reduce_columns_launch<ties, kAll, false>(stream,
                                               ReduceColumns<T>{x, nullptr, pools, n, rows, columns, 0, 0, false});
    else
      reduce_rows_launch<ties, kAll, false>(
          stream, ReduceRows<T>{x, nullptr, pools, n, rows, columns, row_order<T>(columns, false), false});
  };
  pools.squares ? launch(std::true_type()) : launch(std::false_type());
}

template <Ties ties, class T>
void pool_channels_launch(const Stream& stream, const Shape& shape,
                          const T* x,                               // [N, C, H, W]
                          const Compute<T>* channel_gate,           // [N, C]
                          const PartialPools<Compute<T>>& pools) {  // [N, parts, HW], out
  const int64_t n = shape.n, rows = shape.rows(), columns = shape.columns();
  if (shape.channels_last)
    reduce_rows_launch<ties, false, true>(
        stream, ReduceRows<T>{x, channel_gate, pools, n, rows, columns, row_order<T>(columns, true), true});
  else
    reduce_columns_launch<ties, false, true>(stream,
                                             ReduceColumns<T>{x, channel_gate, pools, n, rows, columns, 0, 0, true});
}

}  // namespace cbam_fused
