// The backward of a maximum: who receives its gradient.
#pragma once

#include <cmath>
#include <type_traits>

#include "../types.h"

namespace cbam_fused {

// The gradient of a maximum, and how its places are known: by their index (Ties::kFirst) or their value (Ties::kEven).
template <class A, Ties ties>
struct MaximumGrad {
  using Key = std::conditional_t<ties == Ties::kFirst, int32_t, A>;

  A grad;
  Key key;

  __device__ bool is_at(int32_t index, A value) const {
    if constexpr (ties == Ties::kFirst)
      return index == key;
    else
      return value == key;
  }

  // That of a maximum that does not exist.
  __device__ static MaximumGrad none() { return {A(0), ties == Ties::kFirst ? Key(-1) : Key(NAN)}; }
};

// A maximum's gradient shared by `count` places: what each gets, and what all places get besides. No count: the maximum
// is NaN, and so is the gradient of all.
template <class A>
__device__ inline void share_evenly(int32_t count, A& share, A& rest) {
  if (count == 0) rest = A(NAN);
  share = count == 0 ? A(0) : share / A(count);
}

// What a pixel's channels get from the pooled maps.
template <class A, Ties ties>
struct PixelGrad {
  A mean;
  MaximumGrad<A, ties> max;

  __device__ A of(int32_t channel, A gated) const { return max.is_at(channel, gated) ? mean + max.grad : mean; }
};

}  // namespace cbam_fused
