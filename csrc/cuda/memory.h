// Loads and stores of device memory. Kernels use no others, so that a harness can check and count every access.
//
// x is read in strips of a row. Where rows are whole vectors of 16 bytes (kAligned) a strip is one;
// else it is single elements, far enough apart for neighbouring lanes to access neighbouring elements.
#pragma once

#include <platform.h>

#include "elements.h"

namespace cbam_fused {

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T values[kVector<T>];
};

template <class T>
__device__ inline T load(const T* p) {
  note_load(p, sizeof(T));
  return *p;
}

template <class T>
__device__ inline void store(T* p, T value) {
  note_store(p, sizeof(T));
  *p = value;
}

enum class Space { kDevice, kShared };

template <Space space, class T>
__device__ inline T load_from(const T* p) {
  if constexpr (space == Space::kDevice) return load(p);
  return *p;
}

// Some elements of a row.
template <class T, int kCount>
struct Strip {
  T values[kCount];
};

// The elements at `at`, at + apart, ... of a row that has `columns`; those beyond it are 0. With kAligned `apart` is 1.
template <bool kAligned, int kCount, Space space = Space::kDevice, class T>
__device__ inline Strip<T, kCount> load_strip(const T* row, unsigned at, unsigned apart, unsigned columns) {
  Strip<T, kCount> strip = {};
  if constexpr (kAligned) {
    static_assert(kCount == kVector<T>);
    if (at < columns) {
      const Vector<T> vector = load_from<space>(reinterpret_cast<const Vector<T>*>(row + at));
#pragma unroll
      for (int i = 0; i < kCount; ++i) strip.values[i] = vector.values[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (at + i * apart < columns) strip.values[i] = load_from<space>(row + (at + i * apart));
  }
  return strip;
}

// Numbers in the compute type that belong to the elements of such a strip; 0 beyond `columns`.
template <bool kAligned, int kCount, class A>
__device__ inline void load_factors(const A* row, unsigned at, unsigned apart, unsigned columns, A (&factors)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) factors[i] = A(0);
  if constexpr (kAligned) {
    if (at >= columns) return;
#pragma unroll
    for (int first = 0; first < kCount; first += kVector<A>) {
      const Vector<A> vector = load(reinterpret_cast<const Vector<A>*>(row + at + first));
#pragma unroll
      for (int i = 0; i < kVector<A>; ++i) factors[first + i] = vector.values[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (at + i * apart < columns) factors[i] = load(row + (at + i * apart));
  }
}

}  // namespace cbam_fused
