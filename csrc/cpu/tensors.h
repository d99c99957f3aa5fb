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
#include <string_view>
#include <tuple>
#include <utility>
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

// t itself if its elements are in the order of its dimensions, else a copy that is. (PyTorch's own function returns t
// too, but a call of it costs as much as a small kernel.)
inline Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline OptionalTensor row_major(const OptionalTensor& t) { return t ? OptionalTensor(row_major(*t)) : std::nullopt; }

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
  return row_major(t);
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
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
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

inline int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_int32();
  }
}

// A row-major tensor. (torch::stable::empty finds its operator by name at each call, which takes twice as long.)
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  const auto status = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code_of(dtype),
                                               aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "cbam: a tensor could not be allocated");
  return Tensor(handle);
}
template <class A>
Tensor new_compute(const std::vector<int64_t>& sizes) {
  return empty(sizes, compute_dtype<A>());
}

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

// ---- Threads and scratch --------------------------------------------------------------------------------------------

template <class A>
std::unique_ptr<A[]> scratch(int64_t count) {
  return std::unique_ptr<A[]>(new A[std::max<int64_t>(count, 1)]);
}

// f(begin, end) over [0, count) on PyTorch's threads, in pieces of at least `grain`.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || torch::stable::get_num_threads() == 1) {
    if (count > 0) f(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// True where the work should be spread within each sample, because whole samples would leave threads idle.
inline bool split_samples(int64_t samples) {
  const int64_t threads = torch::stable::get_num_threads();
  return samples < threads || (samples % threads != 0 && samples < 4 * threads);
}

// f(begin, end, spread) over samples [0, count): on each thread for its own samples, or once for all, to spread the
// work within them.
template <class F>
void for_samples(int64_t count, const F& f) {
  if (split_samples(count))
    f(int64_t(0), count, true);
  else
    parallel(count, 1, [&](int64_t begin, int64_t end) { f(begin, end, false); });
}

// f(begin, end) over [0, count), in pieces of whole blocks that are worth a thread if `spread`, for `work` elements an
// item. Blocks of columns should be whole vectors; a row is a block by itself.
constexpr int64_t kColumnBlock = 64;

template <class F>
void for_blocks(bool spread, int64_t count, int64_t block, int64_t work, const F& f) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (block * std::max<int64_t>(work, 1)));
  if (spread)
    parallel((count + block - 1) / block, grain,
             [&](int64_t begin, int64_t end) { f(begin * block, std::min(end * block, count)); });
  else
    f(int64_t(0), count);
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

// Calls f(W()) with the element type of the MLP's weights for an x in T: T, or where they are in it, the compute type.
template <class T, class F>
auto dispatch_weights(const Tensor& weight2, F f) {
  using A = Compute<T>;
  if constexpr (!std::is_same_v<T, A>)
    if (weight2.scalar_type() == compute_dtype<A>()) return f(A());
  return f(T());
}

template <class W>
Mlp<W> make_mlp(const OptionalTensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                const OptionalTensor& bias2) {
  return {row_major(weight1), row_major(weight2), values_of<W>(bias1), values_of<W>(bias2)};
}

// ---- Options --------------------------------------------------------------------------------------------------------

struct Pool {
  bool avg = false, max = false, lp = false, lse = false, light;

  explicit Pool(std::string_view text) : light(text == "light") {
    std::string_view rest = text;
    // Whether `type` comes next; takes it, and the + behind it.
    const auto take = [&](std::string_view type) {
      if (rest.substr(0, rest.find('+')) != type) return false;
      rest.remove_prefix(std::min(type.size() + 1, rest.size()));
      return true;
    };
    if (light) {
      avg = max = true;
      return;
    }
    avg = take("avg");
    max = take("max");
    lp = take("lp");
    lse = take("lse");
    STD_TORCH_CHECK(count() > 0 && rest.empty() && text.back() != '+',
                    "cbam: pool must be light or some of avg, max, lp, lse, in this order, joined by +; got ",
                    std::string(text));
  }
  int64_t count() const { return avg + max + lp + lse; }
  int64_t branches() const { return light ? 1 : count(); }
};

inline Ties parse_ties(std::string_view text) {
  STD_TORCH_CHECK(text == "first" || text == "even", "cbam: ties must be first or even; got ", std::string(text));
  return text == "first" ? Ties::kFirst : Ties::kEven;
}

// Which of the two pooled maps is the maximum, and how many maps the convolution sees.
struct Maps {
  int64_t max, mean, count;

  explicit Maps(std::string_view text) {
    STD_TORCH_CHECK(text == "max_mean" || text == "mean_max" || text == "light",
                    "cbam: maps must be max_mean, mean_max or light; got ", std::string(text));
    max = text == "mean_max";
    mean = 1 - max;
    count = text == "light" ? 1 : 2;
  }
};

template <class A>
Activation<A> parse_activation(std::string_view text) {
  const A none = std::numeric_limits<A>::quiet_NaN();
  STD_TORCH_CHECK(text == "none" || text == "relu" || text == "relu6",
                  "cbam: activation must be none, relu or relu6; got ", std::string(text));
  return {text == "none" ? none : A(0), text == "relu6" ? A(6) : none};
}

// The norm as an affine map: scale * z + shift = weight (z - mean) / sqrt(var + eps) + bias.
template <class A>
struct Norm {
  bool present = false;
  A mean = 0, inverse_deviation = 1, scale = 1, shift = 0;

  Norm(const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean_tensor,
       const OptionalTensor& var, double eps) {
    if (!mean_tensor) return;
    const auto value = [](const OptionalTensor& t, A otherwise) { return t ? *data<A>(*t) : otherwise; };
    present = true;
    mean = value(mean_tensor, 0);
    inverse_deviation = A(1) / std::sqrt(value(var, 1) + A(eps));
    scale = value(weight, 1) * inverse_deviation;
    shift = value(bias, 0) - mean * scale;
  }
};

}  // namespace cbam_fused
