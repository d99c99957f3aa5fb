// Checks of the tensors given to an operation, before anything is read or allocated. The message names operation and
// argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "tensors.h"

namespace cbam_fused {

inline std::string text_of(ScalarType dtype, const int64_t* sizes, size_t count) {
  std::string text = std::string(name_of(dtype)) + " [";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

class Checks {
 public:
  using Sizes = std::initializer_list<int64_t>;

  Checks(const char* op, const Tensor& x)
      : op_(op), dtype_(x.scalar_type()), device_type_(device_type_of(x)), device_index_(x.get_device_index()) {
    STD_TORCH_CHECK(x.dim() == 4 && is_float(dtype_), op_,
                    ": x must be [N, C, H, W] in float32, float16, bfloat16 or float64; got ", text(x));
    shape_ = {x.size(0), x.size(1), x.size(2), x.size(3), false};
    STD_TORCH_CHECK(shape_.sample() > 0, op_, ": x must have C, H and W of at least 1; got ", text(x));
    STD_TORCH_CHECK(std::max(shape_.c, shape_.pixels()) < INT32_MAX, op_,
                    ": x must have less than 2^31 - 1 channels, and pixels a sample; got ", text(x));
    compute_ = dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  const Shape& shape() const { return shape_; }

  // t, if given, has the sizes and dtype, and is on the device of x.
  void tensor(const char* name, const OptionalTensor& t, Sizes sizes, ScalarType dtype) const {
    if (t) tensor(name, *t, sizes, dtype);
  }
  void tensor(const char* name, const Tensor& t, Sizes sizes, ScalarType dtype) const {
    const auto got = t.sizes();
    STD_TORCH_CHECK(t.scalar_type() == dtype && std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()), op_,
                    ": ", name, " must be ", text_of(dtype, sizes.begin(), sizes.size()), "; got ", text(t));
    same_device(name, t);
  }
  void compute(const char* name, const OptionalTensor& t, Sizes sizes) const { tensor(name, t, sizes, compute_); }
  // In the compute dtype or that of x.
  void parameter(const char* name, const OptionalTensor& t, Sizes sizes) const {
    if (t) tensor(name, *t, sizes, t->scalar_type() == dtype_ ? dtype_ : compute_);
  }
  void like_x(const char* name, const OptionalTensor& t) const {
    tensor(name, t, {shape_.n, shape_.c, shape_.h, shape_.w}, dtype_);
  }

  // [C] and [HW] results of the forward.
  void per_channel(const char* name, const OptionalTensor& t) const { compute(name, t, {shape_.n, shape_.c}); }
  void per_pixel(const char* name, const OptionalTensor& t) const { compute(name, t, {shape_.n, shape_.h, shape_.w}); }

  void mlp(const OptionalTensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
           const OptionalTensor& bias2) const {
    const ScalarType dtype = weight2.scalar_type() == dtype_ ? dtype_ : compute_;
    const int64_t reduced = weight1 && weight1->dim() > 0 ? weight1->size(0) : 0;
    STD_TORCH_CHECK(!weight1 || reduced > 0, op_, ": mlp_weight1 must have at least 1 row; got ", text(*weight1));
    if (weight1) layer("mlp_weight1", *weight1, reduced, shape_.c, dtype);
    layer("mlp_weight2", weight2, shape_.c, weight1 ? reduced : shape_.c, dtype);
    tensor("mlp_bias1", bias1, {reduced}, dtype);
    tensor("mlp_bias2", bias2, {shape_.c}, dtype);
  }
  void convolution(const OptionalTensor& weight, const OptionalTensor& bias, int64_t maps) const {
    if (weight) {
      const int64_t k = weight->dim() == 4 ? weight->size(3) : 0;
      STD_TORCH_CHECK(k % 2 == 1, op_, ": conv_weight must be [1, ", maps, ", k, k] with k odd; got ", text(*weight));
      parameter("conv_weight", weight, {1, maps, k, k});
    }
    parameter("conv_bias", bias, {1});
  }
  // [1] in any float.
  void running(const char* name, const OptionalTensor& t) const {
    if (!t) return;
    STD_TORCH_CHECK(is_float(t->scalar_type()) && t->dim() == 1 && t->size(0) == 1, op_, ": ", name,
                    " must be [1] in float32, float16, bfloat16 or float64; got ", text(*t));
    same_device(name, *t);
  }
  void norm(const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
            const OptionalTensor& var) const {
    STD_TORCH_CHECK(bool(mean) == bool(var), op_, ": norm_mean and norm_var must be given together");
    parameter("norm_weight", weight, {1});
    parameter("norm_bias", bias, {1});
    parameter("norm_mean", mean, {1});
    parameter("norm_var", var, {1});
  }

 private:
  static bool is_float(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
           dtype == ScalarType::BFloat16;
  }
  static std::string text(const Tensor& t) { return text_of(t.scalar_type(), t.sizes().data(), t.sizes().size()); }

  void same_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(device_type_of(t) == device_type_ && t.get_device_index() == device_index_, op_, ": ", name,
                    " must be on the device of x");
  }

  // [rows, columns] or [rows, columns, 1, 1].
  void layer(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) const {
    if (t.dim() == 4)
      tensor(name, t, {rows, columns, 1, 1}, dtype);
    else
      tensor(name, t, {rows, columns}, dtype);
  }

  const char* op_;
  ScalarType dtype_, compute_;
  int32_t device_type_, device_index_;
  Shape shape_;
};

}  // namespace cbam_fused
