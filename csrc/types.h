// What host and device code of every backend share: element types, shapes and options. No header of PyTorch is needed.
#pragma once

#include <stdint.h>

namespace cbam_fused {

// ---- Elements -------------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
// The type of sums and gates for tensors of T.
template <class T>
using Compute = typename ComputeOf<T>::type;

// ---- Shapes ---------------------------------------------------------------------------------------------------------

// x, and its samples as matrices: NCHW has channels as rows and pixels as columns, channels_last the reverse.
struct Shape {
  int64_t n, c, h, w;
  bool channels_last;

  constexpr int64_t pixels() const { return h * w; }
  constexpr int64_t rows() const { return channels_last ? pixels() : c; }
  constexpr int64_t columns() const { return channels_last ? c : pixels(); }
  constexpr int64_t sample() const { return c * h * w; }
};

// ---- Options --------------------------------------------------------------------------------------------------------

// How pixels are pooled for the MLP. `light`: avg and max, of which the mean is its one input.
struct Pool {
  bool avg, max, lp, lse, light;

  constexpr int64_t count() const { return avg + max + lp + lse; }
  constexpr int64_t branches() const { return light ? 1 : count(); }
};

// Which of the two pooled maps is the maximum, and how many maps the convolution sees.
struct Maps {
  int64_t max, mean, count;
};

enum class Ties { kNone, kFirst, kEven };

// A gradient through an activation passes where not (y <= lowest) and not (y >= highest); NaN as a bound: no bound.
template <class A>
struct Activation {
  A lowest, highest;
};

}  // namespace cbam_fused
