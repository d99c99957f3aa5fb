// Small tensors whose element type is known only when a kernel runs: parameters, in the compute type or the type of x,
// and running statistics, in any float.
#pragma once

#include "memory.h"

namespace cbam_fused {

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

// The elements of a parameter in the compute type A.
template <class A>
struct Parameter {
  const void* elements;  // null: absent
  ElementType type;

  __host__ __device__ explicit operator bool() const { return elements; }

  __device__ A operator[](int64_t i) const {
    if constexpr (sizeof(A) == sizeof(float)) {
      if (type == ElementType::kHalf) return to_compute(load(static_cast<const __half*>(elements) + i));
      if (type == ElementType::kBFloat16) return to_compute(load(static_cast<const __nv_bfloat16*>(elements) + i));
    }
    return load(static_cast<const A*>(elements) + i);
  }
};

// A running statistic [1], in any float.
struct RunningStatistic {
  void* value;  // or null
  ElementType type;

  __device__ void move_towards(double target, double momentum) const {
    if (!value) return;
    switch (type) {
      case ElementType::kFloat:
        return move(static_cast<float*>(value), target, momentum);
      case ElementType::kDouble:
        return move(static_cast<double*>(value), target, momentum);
      case ElementType::kHalf:
        return move(static_cast<__half*>(value), target, momentum);
      case ElementType::kBFloat16:
        return move(static_cast<__nv_bfloat16*>(value), target, momentum);
    }
  }

 private:
  template <class T>
  __device__ static void move(T* value, double target, double momentum) {
    store(value, rounded<T>(Compute<T>((1 - momentum) * double(to_compute(load(value))) + momentum * target)));
  }
};

}  // namespace cbam_fused
