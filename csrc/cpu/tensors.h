// What every operation of the CPU backend needs of its tensors: layout, dtype dispatch, scratch and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace cbam_fused {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Layout ---------------------------------------------------------------------------------------------------------

inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// x as a matrix per sample; see kernels.h.
struct Shape {
  int64_t n, c, h, w;
  bool channels_last;

  int64_t pixels() const { return h * w; }
  int64_t rows() const { return channels_last ? pixels() : c; }
  int64_t columns() const { return channels_last ? c : pixels(); }
  int64_t sample() const { return c * h * w; }
};

// x itself if NCHW or channels_last, else an NCHW copy.
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}
inline Shape shape_of(const Tensor& dense_x) {
  return {dense_x.size(0), dense_x.size(1), dense_x.size(2), dense_x.size(3), !dense_x.is_contiguous()};
}
// t, of the shape of x, in the layout of x.
inline Tensor in_layout(const Tensor& t, const Shape& shape) {
  if (shape.channels_last) return is_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  return torch::stable::contiguous(t);
}

// ---- Dtypes ---------------------------------------------------------------------------------------------------------

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "no floating-point dtype that is supported";
  }
}

// Calls f(T()) with the element type of `dtype`.
template <class F>
auto dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      STD_TORCH_CHECK(false, "cbam: x must be float32, float16, bfloat16 or float64");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}
template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class A>
constexpr ScalarType compute_dtype() {
  return sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
}

// For the last, short sums over small tensors.
template <class A>
using Wide = std::conditional_t<sizeof(A) == 8, long double, double>;

inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}
template <class A>
Tensor new_compute(std::vector<int64_t> sizes) {
  return empty(std::move(sizes), compute_dtype<A>());
}

inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }
inline float to_compute(Half value) {
  return torch::headeronly::Half(value.bits, torch::headeronly::Half::from_bits());
}
inline float to_compute(BFloat16 value) {
  return torch::headeronly::BFloat16(value.bits, torch::headeronly::BFloat16::from_bits());
}

// A small tensor of parameters in W, as a vector in the compute type; empty if absent.
template <class W>
std::vector<Compute<W>> values_of(const OptionalTensor& t, const char* op, const char* name, ScalarType expected) {
  if (!t) return {};
  STD_TORCH_CHECK(t->scalar_type() == expected, op, ": ", name, " must be ", name_of(expected), "; got ",
                  name_of(t->scalar_type()));
  const Tensor dense = torch::stable::contiguous(*t);
  std::vector<Compute<W>> out(dense.numel());
  std::transform(data<W>(dense), data<W>(dense) + out.size(), out.begin(), [](W v) { return to_compute(v); });
  return out;
}
template <class A>
std::vector<A> compute_values_of(const OptionalTensor& t, const char* op, const char* name) {
  return values_of<A>(t, op, name, compute_dtype<A>());
}

// ---- Threads and scratch --------------------------------------------------------------------------------------------

// f(begin, end) over [0, count) on PyTorch's threads, in pieces of at least `grain`.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || torch::stable::get_num_threads() == 1) {
    if (count > 0) f(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

template <class A>
std::unique_ptr<A[]> scratch(int64_t count) {
  return std::unique_ptr<A[]>(new A[std::max<int64_t>(count, 1)]);
}

// The same in pieces of whole vectors, for `work` elements an item: a piece is worth a thread.
template <class F>
void parallel_blocks(int64_t count, int64_t work, const F& f) {
  constexpr int64_t kBlock = 64, kWorthAThread = 16384;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (kBlock * std::max<int64_t>(work, 1)));
  parallel((count + kBlock - 1) / kBlock, grain,
           [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(end * kBlock, count)); });
}

// True where the work should be spread within each sample, because whole samples would leave threads idle.
inline bool split_samples(int64_t samples) {
  const int64_t threads = torch::stable::get_num_threads();
  return samples < threads || (samples % threads != 0 && samples < 4 * threads);
}

// ---- Weights of the MLP ---------------------------------------------------------------------------------------------

// The weights of the MLP, in W: the dtype of x, or the compute dtype.
template <class W>
struct Mlp {
  using A = Compute<W>;
  OptionalTensor weight1;       // [R, C] or [R, C, 1, 1]
  Tensor weight2;               // [C, R] or [C, R, 1, 1]
  std::vector<A> bias1, bias2;  // [R], [C], or empty

  int64_t reduced() const { return weight1 ? weight1->size(0) : 0; }
};

// Calls f(W()) with the element type of the MLP's weights for an x in T: T, or where they are in it, the compute type.
template <class T, class F>
auto dispatch_weights(const Tensor& weight2, F f) {
  using A = Compute<T>;
  if constexpr (!std::is_same_v<T, A>)
    if (weight2.scalar_type() == compute_dtype<A>()) return f(A());
  return f(T());
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class W>
Mlp<W> make_mlp(const char* op, ScalarType dtype, const OptionalTensor& weight1, const OptionalTensor& bias1,
                const Tensor& weight2, const OptionalTensor& bias2) {
  const auto check = [&](const OptionalTensor& t, const char* name) {
    STD_TORCH_CHECK(!t || t->scalar_type() == dtype, op, ": ", name, " must be ", name_of(dtype), "; got ",
                    name_of(t->scalar_type()));
  };
  check(weight1, "mlp_weight1");
  check(weight2, "mlp_weight2");
  return {contiguous(weight1), torch::stable::contiguous(weight2), values_of<W>(bias1, op, "mlp_bias1", dtype),
          values_of<W>(bias2, op, "mlp_bias2", dtype)};
}

// ---- Options --------------------------------------------------------------------------------------------------------

struct Pool {
  bool avg, max, lp, lse, light;

  explicit Pool(const std::string& text) : light(text == "light") {
    const auto has = [&](const char* type) {
      return ("+" + text + "+").find(std::string("+") + type + "+") != std::string::npos;
    };
    avg = light || has("avg");
    max = light || has("max");
    lp = has("lp");
    lse = has("lse");
    STD_TORCH_CHECK(avg || max || lp || lse,
                    "cbam: pool must be light or a subset of avg, max, lp, lse joined by +; got ", text);
  }
  int64_t count() const { return avg + max + lp + lse; }
  int64_t branches() const { return light ? 1 : count(); }
};

inline Ties parse_ties(const std::string& text) {
  STD_TORCH_CHECK(text == "first" || text == "even", "cbam: ties must be first or even; got ", text);
  return text == "first" ? Ties::kFirst : Ties::kEven;
}

// Which of the two pooled maps is the maximum, and how many maps the convolution sees.
struct Maps {
  int64_t max, mean, count;

  explicit Maps(const std::string& text) {
    STD_TORCH_CHECK(text == "max_mean" || text == "mean_max" || text == "light",
                    "cbam: maps must be max_mean, mean_max or light; got ", text);
    max = text == "mean_max";
    mean = 1 - max;
    count = text == "light" ? 1 : 2;
  }
};

template <class A>
Activation<A> parse_activation(const std::string& text) {
  const A none = std::numeric_limits<A>::quiet_NaN();
  STD_TORCH_CHECK(text == "none" || text == "relu" || text == "relu6",
                  "cbam: activation must be none, relu or relu6; got ", text);
  return {text == "none" ? none : A(0), text == "relu6" ? A(6) : none};
}

// The norm as an affine map: scale * z + shift = weight (z - mean) / sqrt(var + eps) + bias.
template <class A>
struct Norm {
  bool present = false;
  A mean = 0, inverse_deviation = 1, scale = 1, shift = 0;

  Norm(const char* op, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean_tensor,
       const OptionalTensor& var, double eps) {
    if (!mean_tensor) return;
    const auto value = [&](const OptionalTensor& t, const char* name, A otherwise) {
      return t ? compute_values_of<A>(t, op, name).at(0) : otherwise;
    };
    present = true;
    mean = value(mean_tensor, "norm_mean", 0);
    inverse_deviation = A(1) / std::sqrt(value(var, "norm_var", 1) + A(eps));
    scale = value(weight, "norm_weight", 1) * inverse_deviation;
    shift = value(bias, "norm_bias", 0) - mean * scale;
  }
};

}  // namespace cbam_fused
