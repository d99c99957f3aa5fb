// Vectors of 64 bytes (16 floats or 8 doubles) whatever the instruction set, so that every capability computes
// the same bits: the lanes, the order of every sum and each rounding are the same, only the speed differs.
//
// Everything is inside the namespace of the capability that this translation unit is compiled for, and no header of
// the standard library or of PyTorch is included: the linker might otherwise keep the AVX-512 copy of a shared inline
// function for every caller.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace cbam_fused::CBAM_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kNativeBytes = 64;
#elif defined(__AVX2__)
constexpr int kNativeBytes = 32;
#else
constexpr int kNativeBytes = 16;
#endif
constexpr int kVectorBytes = 64;
constexpr int kParts = kVectorBytes / kNativeBytes;

template <class E>
struct NativeOf {
  typedef E type __attribute__((vector_size(kNativeBytes)));
};
template <class E>
using Native = typename NativeOf<E>::type;

// The integer as wide as a lane: indices, counts and masks (all bits set where true).
template <class A>
struct IndexOf;
template <>
struct IndexOf<float> {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};
template <class A>
using Index = typename IndexOf<A>::type;

template <class E>
struct Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(E);
  Native<E> part[kParts];
};

template <class A>
using Mask = Vector<Index<A>>;

template <class E>
inline Vector<E> broadcast(E value) {
  Vector<E> out;
  for (int p = 0; p < kParts; ++p) out.part[p] = value - Native<E>{};
  return out;
}

template <class E, class F>
inline Vector<E> map(const Vector<E>& a, const Vector<E>& b, F f) {
  Vector<E> out;
  for (int p = 0; p < kParts; ++p) out.part[p] = f(a.part[p], b.part[p]);
  return out;
}

template <class E>
inline Vector<E> operator+(const Vector<E>& a, const Vector<E>& b) {
  return map(a, b, [](Native<E> s, Native<E> t) { return s + t; });
}
template <class E>
inline Vector<E> operator-(const Vector<E>& a, const Vector<E>& b) {
  return map(a, b, [](Native<E> s, Native<E> t) { return s - t; });
}
template <class E>
inline Vector<E> operator*(const Vector<E>& a, const Vector<E>& b) {
  return map(a, b, [](Native<E> s, Native<E> t) { return s * t; });
}
template <class E>
inline Vector<E> operator/(const Vector<E>& a, const Vector<E>& b) {
  return map(a, b, [](Native<E> s, Native<E> t) { return s / t; });
}
template <class E>
inline Vector<E> operator|(const Vector<E>& a, const Vector<E>& b) {
  return map(a, b, [](Native<E> s, Native<E> t) { return s | t; });
}

// select(condition, a, b): a where the condition on the lanes of s and t holds, else b. The comparison stays beside the
// choice so that it needs no mask in a vector register.
template <class A, class E, class F>
inline Vector<E> select(const Vector<A>& s, const Vector<A>& t, F condition, const Vector<E>& a,
                        const Vector<E>& b) {
  Vector<E> out;
  for (int p = 0; p < kParts; ++p)
    out.part[p] = condition(s.part[p], t.part[p]) ? a.part[p] : b.part[p];
  return out;
}

struct Greater {
  template <class N>
  auto operator()(N s, N t) const {
    return s > t;
  }
};
struct Less {
  template <class N>
  auto operator()(N s, N t) const {
    return s < t;
  }
};
struct Equal {
  template <class N>
  auto operator()(N s, N t) const {
    return s == t;
  }
};
struct GreaterEqual {
  template <class N>
  auto operator()(N s, N t) const {
    return s >= t;
  }
};
struct LessEqual {
  template <class N>
  auto operator()(N s, N t) const {
    return s <= t;
  }
};
struct EqualOrBothNan {
  template <class N>
  auto operator()(N s, N t) const {
    return (s == t) | ((s != s) & (t != t));
  }
};
// s beats the running maximum t, visited in ascending order: a NaN beats all but an earlier NaN.
struct GreaterOrFirstNan {
  template <class N>
  auto operator()(N s, N t) const {
    return (s > t) | ((s != s) & (t == t));
  }
};
// The same visited in descending order, where the later of two equal values has the smaller index.
struct GreaterEqualOrNan {
  template <class N>
  auto operator()(N s, N t) const {
    return (s >= t) | (s != s);
  }
};

template <class A>
inline Vector<A> max_or_nan(const Vector<A>& v, const Vector<A>& m) {
  return select(v, m, GreaterEqualOrNan(), v, m);
}

// 0, 1, 2, ...
template <class E>
inline Vector<E> iota() {
  E lanes[Vector<E>::kLanes];
  for (int i = 0; i < Vector<E>::kLanes; ++i) lanes[i] = E(i);
  Vector<E> out;
  memcpy(&out, lanes, sizeof(out));
  return out;
}

// ---- Loads and stores, with conversion ---------------------------------------------------------------------------

template <class E>
inline Vector<E> load(const E* source) {
  Vector<E> out;
  memcpy(&out, source, sizeof(out));
  return out;
}
template <class E>
inline void store(E* target, const Vector<E>& v) {
  memcpy(target, &v, sizeof(v));
}

typedef uint16_t NativeBits16 __attribute__((vector_size(kNativeBytes / 2)));
constexpr int kNativeFloats = kNativeBytes / 4;

inline Vector<float> load(const BFloat16* source) {
  Vector<float> out;
  for (int p = 0; p < kParts; ++p) {
    NativeBits16 bits;
    memcpy(&bits, source + p * kNativeFloats, sizeof(bits));
    const Native<uint32_t> wide = __builtin_convertvector(bits, Native<uint32_t>) << 16;
    memcpy(&out.part[p], &wide, sizeof(wide));
  }
  return out;
}

inline void store(BFloat16* target, const Vector<float>& v) {
  for (int p = 0; p < kParts; ++p) {
    Native<uint32_t> bits;
    memcpy(&bits, &v.part[p], sizeof(bits));
    const Native<uint32_t> rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
    const Native<uint32_t> quiet_nan = (bits >> 16) | 0x40;
    const Native<uint32_t> chosen = v.part[p] == v.part[p] ? rounded : quiet_nan;
    const NativeBits16 narrow = __builtin_convertvector(chosen, NativeBits16);
    memcpy(target + p * kNativeFloats, &narrow, sizeof(narrow));
  }
}

#if defined(__AVX512F__)
inline Vector<float> load(const Half* source) {
  return {{Native<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))))}};
}
inline void store(Half* target, const Vector<float>& v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph(__m512(v.part[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Vector<float> load(const Half* source) {
  Vector<float> out;
  for (int p = 0; p < kParts; ++p)
    out.part[p] = Native<float>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + p * kNativeFloats))));
  return out;
}
inline void store(Half* target, const Vector<float>& v) {
  for (int p = 0; p < kParts; ++p)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + p * kNativeFloats),
                     _mm256_cvtps_ph(__m256(v.part[p]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 0x1f, fraction = half & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float value = float(fraction) * 0x1p-24f;
    memcpy(&bits, &value, 4);
  } else {
    bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00 | uint16_t(bits >> 13 & 0x3ff);
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: adding 0.5 aligns and rounds the fraction
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
inline Vector<float> load(const Half* source) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = half_to_float(source[i].bits);
  return load(lanes);
}
inline void store(Half* target, const Vector<float>& v) {
  float lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; ++i) target[i].bits = float_to_half(lanes[i]);
}
#endif

// The first `count` lanes; the others are zero.
template <class T>
inline Vector<Compute<T>> load_first(const T* source, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 8) {
    return {{Native<double>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), source))}};
  } else if constexpr (sizeof(T) == 4) {
    return {{Native<float>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), source))}};
  } else {
    T lanes[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes),
                        _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), source));
    return load(lanes);
  }
#else
  T lanes[Vector<Compute<T>>::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
#endif
}

template <class T>
inline void store_first(T* target, const Vector<Compute<T>>& v, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(target, __mmask8((1u << count) - 1), __m512d(v.part[0]));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(target, __mmask16((1u << count) - 1), __m512(v.part[0]));
  } else {
    T lanes[16];
    store(lanes, v);
    _mm256_mask_storeu_epi16(target, __mmask16((1u << count) - 1),
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
#else
  T lanes[Vector<Compute<T>>::kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
#endif
}

// Loads and stores of a run of columns: full vectors, then one of the `count` first lanes. body(column, count), where
// count is a compile-time kLanes in the full part, so that load_some and store_some fold to plain loads and stores.
template <class T>
inline Vector<Compute<T>> load_some(const T* source, int64_t count) {
  return count == Vector<Compute<T>>::kLanes ? load(source) : load_first(source, count);
}
template <class T>
inline void store_some(T* target, const Vector<Compute<T>>& v, int64_t count) {
  count == Vector<Compute<T>>::kLanes ? store(target, v) : store_first(target, v, count);
}
template <int kLanes, class F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, F body) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) body(j, int64_t(kLanes));
  if (j < end) body(j, end - j);
}

// Indices and counts are lanes as wide as the values, but int32 in memory.
template <class A>
inline void store_indices(int32_t* target, const Vector<Index<A>>& v, int64_t count) {
  Index<A> lanes[Vector<A>::kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) target[i] = int32_t(lanes[i]);
}
template <class A>
inline Vector<Index<A>> load_indices(const int32_t* source, int64_t count) {
  Index<A> lanes[Vector<A>::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
}

// ---- Across lanes, in a fixed order: lane i with lane i + kLanes/2, and so on ---------------------------------------

template <int... I>
struct Lanes {};
template <int n, int... I>
struct MakeLanes : MakeLanes<n - 1, n - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};
template <int shift, class N, int... I>
inline N rotate(N v, Lanes<I...>) {
  return __builtin_shufflevector(v, v, ((I + shift) % int(sizeof...(I)))...);
}
template <int half, class E, class F>
inline void fold_native(Vector<E>& v, F f) {
  constexpr int kNativeLanes = kNativeBytes / sizeof(E);
  if constexpr (half >= 1) {
    v.part[0] = f(v.part[0], rotate<half>(v.part[0], typename MakeLanes<kNativeLanes>::type()));
    fold_native<half / 2>(v, f);
  }
}
template <class E, class F>
inline E fold(Vector<E> v, F f) {
  for (int half = kParts / 2; half >= 1; half /= 2)
    for (int p = 0; p < half; ++p) v.part[p] = f(v.part[p], v.part[p + half]);
  fold_native<kNativeBytes / int(sizeof(E)) / 2>(v, f);
  return v.part[0][0];
}
template <class A>
inline A sum_of(const Vector<A>& v) {
  return fold(v, [](Native<A> s, Native<A> t) { return s + t; });
}
template <class A>
inline A max_of(const Vector<A>& v) {
  return fold(v, [](Native<A> s, Native<A> t) { return ((s >= t) | (s != s)) ? s : t; });
}

// ---- Exponential and sigmoid ---------------------------------------------------------------------------------------

inline Vector<float> exponential(const Vector<float>& x) {
  Vector<float> out;
  for (int p = 0; p < kParts; ++p) {
    using N = Native<float>;
    const N v = x.part[p];
    const N highest = 88.72283f - N{}, lowest = -87.33654f - N{};
    N clamped = v > highest ? highest : v;
    clamped = clamped < lowest ? lowest : clamped;
    // exp(v) = 2^n exp(r), |r| <= ln(2) / 2; the sum with 1.5 * 2^23 rounds to an integer.
    const N shifted = clamped * 1.44269504f + 12582912.f;
    const N n = shifted - 12582912.f;
    const N r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    N series = r * (1.f / 5040) + 1.f / 720;  // Taylor to r^7: error 5e-9
    series = series * r + 1.f / 120;
    series = series * r + 1.f / 24;
    series = series * r + 1.f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.f;
    series = series * r + 1.f;
    // 2^n in two factors: 2^128 is not a float.
    const Native<int32_t> exponent = __builtin_convertvector(n, Native<int32_t>);
    const Native<int32_t> first = exponent >> 1, second = exponent - first;
    N scale_first, scale_second;
    const Native<int32_t> bits_first = (first + 127) << 23, bits_second = (second + 127) << 23;
    memcpy(&scale_first, &bits_first, sizeof(N));
    memcpy(&scale_second, &bits_second, sizeof(N));
    N result = series * scale_first * scale_second;
    result = v > highest ? HUGE_VALF - N{} : result;
    result = v < lowest ? N{} : result;
    out.part[p] = v == v ? result : v;
  }
  return out;
}

inline Vector<double> exponential(const Vector<double>& x) {
  double lanes[8];
  store(lanes, x);
  for (double& lane : lanes) lane = exp(lane);
  return load(lanes);
}

template <class A>
inline Vector<A> sigmoid(const Vector<A>& x) {
  const Vector<A> one = broadcast(A(1));
  return one / (one + exponential(Vector<A>{} - x));
}

}  // namespace cbam_fused::CBAM_CPU_CAPABILITY
