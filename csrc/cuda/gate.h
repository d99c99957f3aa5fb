// The scalar functions of the gate: norm, sigmoid, activation.
#pragma once

#include <cmath>

#include "parameter.h"

namespace cbam_fused {

template <class A>
__device__ inline A sigmoid(A value) {
  return A(1) / (A(1) + std::exp(-value));
}

// The parameters and statistics of the norm of the logits. No mean: there is no norm.
template <class A>
struct NormParameters {
  Parameter<A> weight;  // [1] or absent: 1
  Parameter<A> bias;    // [1] or absent: 0
  Parameter<A> mean;    // [1] or absent
  Parameter<A> var;     // [1] or absent
  double eps;

  __device__ A inverse_deviation() const { return A(1) / std::sqrt(var[0] + A(eps)); }
};

// The norm as an affine map of a logit.
template <class A>
struct Affine {
  A scale, shift;

  __device__ explicit Affine(const NormParameters<A>& norm) : scale(1), shift(0) {
    if (!norm.mean) return;
    scale = norm.inverse_deviation();
    if (norm.weight) scale = norm.weight[0] * scale;
    shift = -norm.mean[0] * scale;
    if (norm.bias) shift = norm.bias[0] + shift;
  }
  __device__ A operator()(A logit) const { return logit * scale + shift; }
};

// value through the activation; NaN stays.
template <class A>
__device__ inline A activate(A value, Activation<A> activation) {
  if (value <= activation.lowest) value = activation.lowest;
  if (value >= activation.highest) value = activation.highest;
  return value;
}

}  // namespace cbam_fused
