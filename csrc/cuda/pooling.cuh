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

// The two poolings, each along the rows in one layout and along the columns in the other.
template <class T>
ReduceRows<T> pixel_rows(const Shape& s, const T* x, const PartialPools<Compute<T>>& pools) {
  return {x, pools, s.rows(), s.columns(), row_order<T>(s.columns(), false), {0, s.n, false}};
}
template <class T>
ReduceColumns<T> pixel_columns(const Shape& s, const T* x, const PartialPools<Compute<T>>& pools) {
  return {x, pools, s.rows(), s.columns(), {0, s.n, false}};
}
template <class T>
ReduceRows<T> channel_rows(const Shape& s, const T* x, const PartialPools<Compute<T>>& pools) {
  return {x, pools, s.rows(), s.columns(), row_order<T>(s.columns(), true), {0, s.n, true}};
}
template <class T>
ReduceColumns<T> channel_columns(const Shape& s, const T* x, const PartialPools<Compute<T>>& pools) {
  return {x, pools, s.rows(), s.columns(), {0, s.n, true}};
}

template <Ties ties, class T>
void pool_pixels_launch(const Stream& stream, const Shape& shape,
                        const T* x,                               // [N, C, H, W]
                        const PartialPools<Compute<T>>& pools) {  // [N, parts, C], out
  const auto launch = [&](auto all) {
    constexpr bool kAll = decltype(all)::value;
    if (shape.channels_last)
      reduce_columns_launch<ties, kAll>(stream, pixel_columns(shape, x, pools), NoFactors());
    else
      reduce_rows_launch<ties, kAll>(stream, pixel_rows(shape, x, pools), NoFactors());
  };
  pools.squares ? launch(std::true_type()) : launch(std::false_type());
}

template <Ties ties, class T>
void pool_channels_launch(const Stream& stream, const Shape& shape,
                          const T* x,                               // [N, C, H, W]
                          const Compute<T>* channel_gate,           // [N, C]
                          const PartialPools<Compute<T>>& pools) {  // [N, parts, HW], out
  const FactorsInMemory<Compute<T>> factors = {channel_gate, shape.c};
  if (shape.channels_last)
    reduce_rows_launch<ties, false>(stream, channel_rows(shape, x, pools), factors);
  else
    reduce_columns_launch<ties, false>(stream, channel_columns(shape, x, pools), factors);
}

}  // namespace cbam_fused
