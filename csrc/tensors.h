// What an operation of any compiled backend needs of its tensors and options: layout, dtypes, allocation, parsing.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "types.h"

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

template <class A>
constexpr ScalarType compute_dtype() {
  return sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
}

// Calls f(W()) with the element type of the MLP's weights for an x in T: T, or where they are in it, the compute type.
template <class T, class F>
auto dispatch_weights(const Tensor& weight2, F f) {
  using A = Compute<T>;
  if constexpr (!std::is_same_v<T, A>)
    if (weight2.scalar_type() == compute_dtype<A>()) return f(A());
  return f(T());
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

// ---- Allocation -----------------------------------------------------------------------------------------------------

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

inline int32_t device_type_of(const Tensor& t) {
  int32_t type;
  STD_TORCH_CHECK(aoti_torch_get_device_type(t.get(), &type) == AOTI_TORCH_SUCCESS, "cbam: a tensor has no device");
  return type;
}

// A row-major tensor on the device of x. (torch::stable::empty finds its operator by name at each call, which takes
// twice as long.)
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& x) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  const auto status = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code_of(dtype),
                                               device_type_of(x), x.get_device_index(), &handle);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "cbam: a tensor could not be allocated");
  return Tensor(handle);
}
template <class A>
Tensor new_compute(const std::vector<int64_t>& sizes, const Tensor& x) {
  return empty(sizes, compute_dtype<A>(), x);
}

// ---- Options --------------------------------------------------------------------------------------------------------

inline Pool parse_pool(std::string_view text) {
  if (text == "light") return {true, true, false, false, true};
  std::string_view rest = text;
  // Whether `type` comes next; takes it, and the + behind it.
  const auto take = [&](std::string_view type) {
    if (rest.substr(0, rest.find('+')) != type) return false;
    rest.remove_prefix(std::min(type.size() + 1, rest.size()));
    return true;
  };
  const Pool pool{take("avg"), take("max"), take("lp"), take("lse"), false};
  STD_TORCH_CHECK(pool.count() > 0 && rest.empty() && text.back() != '+',
                  "cbam: pool must be light or some of avg, max, lp, lse, in this order, joined by +; got ",
                  std::string(text));
  return pool;
}

inline Maps parse_maps(std::string_view text) {
  STD_TORCH_CHECK(text == "max_mean" || text == "mean_max" || text == "light",
                  "cbam: maps must be max_mean, mean_max or light; got ", std::string(text));
  const int64_t max = text == "mean_max";
  return {max, 1 - max, text == "light" ? 1 : 2};
}

inline Ties parse_ties(std::string_view text) {
  STD_TORCH_CHECK(text == "first" || text == "even", "cbam: ties must be first or even; got ", std::string(text));
  return text == "first" ? Ties::kFirst : Ties::kEven;
}

template <class A>
Activation<A> parse_activation(std::string_view text) {
  const A none = std::numeric_limits<A>::quiet_NaN();
  STD_TORCH_CHECK(text == "none" || text == "relu" || text == "relu6",
                  "cbam: activation must be none, relu or relu6; got ", std::string(text));
  return {text == "none" ? none : A(0), text == "relu6" ? A(6) : none};
}

}  // namespace cbam_fused
