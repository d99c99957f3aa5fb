// The gate's parameters, as the CPU kernels take them: small tensors as vectors, the MLP, the norm; and single elements
// as numbers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "../tensors.h"

namespace cbam_fused::cpu {

// ---- Elements -------------------------------------------------------------------------------------------------------

// For the last, short sums over small tensors.
template <class A>
using Wide = std::conditional_t<sizeof(A) == 8, long double, double>;

inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }
inline float to_compute(Half value) {
  return torch::headeronly::Half(value.bits, torch::headeronly::Half::from_bits());
}
inline float to_compute(BFloat16 value) {
  return torch::headeronly::BFloat16(value.bits, torch::headeronly::BFloat16::from_bits());
}

template <class T>
T from_double(double value) {
  return T(value);
}
template <>
inline Half from_double<Half>(double value) {
  return {torch::headeronly::Half(float(value)).x};
}
template <>
inline BFloat16 from_double<BFloat16>(double value) {
  return {torch::headeronly::BFloat16(float(value)).x};
}

// A small tensor of parameters in W, as a vector in the compute type; empty if absent.
template <class W>
std::vector<Compute<W>> values_of(const OptionalTensor& t) {
  if (!t) return {};
  const Tensor values = row_major(*t);
  std::vector<Compute<W>> out(values.numel());
  std::transform(data<W>(values), data<W>(values) + out.size(), out.begin(), [](W v) { return to_compute(v); });
  return out;
}

// The same of a tensor in T or its compute type, for tensors of T.
template <class T>
std::vector<Compute<T>> parameter(const OptionalTensor& t) {
  using A = Compute<T>;
  return t && t->scalar_type() == compute_dtype<A>() ? values_of<A>(t) : values_of<T>(t);
}

// ---- The MLP --------------------------------------------------------------------------------------------------------

// The weights of the MLP, in W: the dtype of x, or the compute dtype.
template <class W>
struct Mlp {
  using A = Compute<W>;
  OptionalTensor weight1;       // [R, C] or [R, C, 1, 1]
  Tensor weight2;               // [C, R] or [C, R, 1, 1]
  std::vector<A> bias1, bias2;  // [R], [C], or empty

  int64_t reduced() const { return weight1 ? weight1->size(0) : 0; }
};

// What enters the MLP, [samples, B, C]: the descriptors themselves, or in `own` their mean for the light form.
template <class A>
const A* mlp_inputs(const A* descriptors, bool light, int64_t samples, int64_t c, std::vector<A>& own) {
  if (!light) return descriptors;
  own.resize(samples * c);
  for (int64_t i = 0; i < samples; ++i)
    for (int64_t j = 0; j < c; ++j)
      own[i * c + j] = A(0.5) * descriptors[2 * i * c + j] + A(0.5) * descriptors[(2 * i + 1) * c + j];
  return own.data();
}

// What enters the last layer, [samples, width]: the sum over branches, since that layer is linear.
template <class A>
const A* sum_branches(const A* layer, int64_t samples, int64_t branches, int64_t width, std::vector<A>& own) {
  if (branches == 1) return layer;
  own.resize(samples * width);
  for (int64_t i = 0; i < samples; ++i)
    for (int64_t j = 0; j < width; ++j) {
      A sum = layer[i * branches * width + j];
      for (int64_t b = 1; b < branches; ++b) sum += layer[(i * branches + b) * width + j];
      own[i * width + j] = sum;
    }
  return own.data();
}

template <class W>
Mlp<W> make_mlp(const OptionalTensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                const OptionalTensor& bias2) {
  return {row_major(weight1), row_major(weight2), values_of<W>(bias1), values_of<W>(bias2)};
}

// ---- The norm -------------------------------------------------------------------------------------------------------

// The norm as an affine map: scale * z + shift = weight (z - mean) / sqrt(var + eps) + bias. For an x in T.
template <class T>
struct Norm {
  using A = Compute<T>;
  bool present = false;
  A mean = 0, inverse_deviation = 1, scale = 1, shift = 0;

  Norm(const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean_tensor,
       const OptionalTensor& var, double eps) {
    if (!mean_tensor) return;
    const auto value = [](const OptionalTensor& t, A otherwise) { return t ? parameter<T>(t)[0] : otherwise; };
    present = true;
    mean = value(mean_tensor, 0);
    inverse_deviation = A(1) / std::sqrt(value(var, 1) + A(eps));
    scale = value(weight, 1) * inverse_deviation;
    shift = value(bias, 0) - mean * scale;
  }
};

}  // namespace cbam_fused::cpu
