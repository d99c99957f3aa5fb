// Vectors of 64 bytes (16 floats or 8 doubles) whatever the instruction set: the lanes and the order of every sum are
// the same in each capability. AVX2 and AVX-512 compute the same bits.
//
// Everything is inside the namespace of the capability that this translation unit is compiled for, and no inline
// function of the standard library or of PyTorch is used: the linker might keep the AVX-512 copy of one for every
// caller.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

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

// Compile-time conditions as arguments.
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

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

// a * b + c, rounded once where the instruction exists; the baseline rounds twice.
#if defined(__FMA__)
#if defined(__AVX512F__)
inline Native<float> fma_native(Native<float> a, Native<float> b, Native<float> c) {
  return Native<float>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}
inline Native<double> fma_native(Native<double> a, Native<double> b, Native<double> c) {
  return Native<double>(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
}
#else
inline Native<float> fma_native(Native<float> a, Native<float> b, Native<float> c) {
  return Native<float>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}
inline Native<double> fma_native(Native<double> a, Native<double> b, Native<double> c) {
  return Native<double>(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
}
#endif
#else
template <class N>
inline N fma_native(N a, N b, N c) {
  return a * b + c;
}
#endif
template <class A>
inline Vector<A> multiply_add(const Vector<A>& a, const Vector<A>& b, const Vector<A>& c) {
  Vector<A> out;
  for (int p = 0; p < kParts; ++p) out.part[p] = fma_native(a.part[p], b.part[p], c.part[p]);
  return out;
}

// a > b ? a : b, so b where either is NaN: one instruction, which the compiler does not always find by itself.
#if defined(__AVX512F__)
inline Native<float> larger_native(Native<float> a, Native<float> b) {
  return Native<float>(_mm512_max_ps(__m512(a), __m512(b)));
}
inline Native<double> larger_native(Native<double> a, Native<double> b) {
  return Native<double>(_mm512_max_pd(__m512d(a), __m512d(b)));
}
#elif defined(__AVX2__)
inline Native<float> larger_native(Native<float> a, Native<float> b) {
  return Native<float>(_mm256_max_ps(__m256(a), __m256(b)));
}
inline Native<double> larger_native(Native<double> a, Native<double> b) {
  return Native<double>(_mm256_max_pd(__m256d(a), __m256d(b)));
}
#else
template <class N>
inline N larger_native(N a, N b) {
  return a > b ? a : b;
}
#endif
template <class A>
inline Vector<A> larger(const Vector<A>& a, const Vector<A>& b) {
  return map(a, b, [](Native<A> s, Native<A> t) { return larger_native(s, t); });
}

// select(condition, a, b): a where the condition on the lanes of s and t holds, else b. The comparison stays beside the
// choice so that it needs no mask in a vector register.
template <class A, class E, class F>
inline Vector<E> select(const Vector<A>& s, const Vector<A>& t, F condition, const Vector<E>& a, const Vector<E>& b) {
  Vector<E> out;
  for (int p = 0; p < kParts; ++p) out.part[p] = condition(s.part[p], t.part[p]) ? a.part[p] : b.part[p];
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

// 0, 1, 2, ...
template <class E>
inline Vector<E> iota() {
  E lanes[Vector<E>::kLanes];
  for (int i = 0; i < Vector<E>::kLanes; ++i) lanes[i] = E(i);
  Vector<E> out;
  memcpy(&out, lanes, sizeof(out));
  return out;
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
// The sum over lanes, in a wider type: it is rounded once.
inline double sum_of(const Vector<double>& v) {
  double lanes[8];
  memcpy(lanes, &v, sizeof(lanes));
  long double sum = 0;
  for (const double lane : lanes) sum += lane;
  return double(sum);
}
inline float sum_of(const Vector<float>& v) {
#if defined(__AVX512F__)
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(__m512(v.part[0])), 1));
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(__m512(v.part[0]))), high = _mm512_cvtps_pd(upper);
  const Vector<double> wide{{Native<double>(low + high)}};
#else
  float lanes[16];
  double sums[8];
  memcpy(lanes, &v, sizeof(lanes));
  for (int i = 0; i < 8; ++i) sums[i] = double(lanes[i]) + double(lanes[i + 8]);
  Vector<double> wide;
  memcpy(&wide, sums, sizeof(wide));
#endif
  return float(fold(wide, [](Native<double> s, Native<double> t) { return s + t; }));
}

// ---- Across the lanes of several vectors at once, in the same order as one by one: fewer instructions a vector ------

constexpr int kFolded = 8;

// out[i] = sum_of(v[i]).
template <class A>
inline void sums_of(const Vector<A>* v, A* out) {
  for (int i = 0; i < kFolded; ++i) out[i] = sum_of(v[i]);
}
// out[i] = the largest lane of v[i], none of which is NaN.
template <class A>
inline void maxima_of(const Vector<A>* v, A* out) {
  for (int i = 0; i < kFolded; ++i) out[i] = fold(v[i], [](Native<A> s, Native<A> t) { return s > t ? s : t; });
}

#if defined(__AVX512F__)
// Each step halves the lanes that a vector still has, and puts two vectors into one.
template <>
inline void sums_of(const Vector<float>* v, float* out) {
  __m512d wide[kFolded], fours[4], twos[2];
  for (int i = 0; i < kFolded; ++i) {
    const __m512 lanes = __m512(v[i].part[0]);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1));
    wide[i] = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes)) + _mm512_cvtps_pd(upper);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = wide[2 * i], b = wide[2 * i + 1];
    fours[i] = _mm512_shuffle_f64x2(a, b, 0x44) + _mm512_shuffle_f64x2(a, b, 0xee);
  }
  for (int i = 0; i < 2; ++i) {
    const __m512d a = fours[2 * i], b = fours[2 * i + 1];
    twos[i] = _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd);
  }
  const __m512d sums = _mm512_unpacklo_pd(twos[0], twos[1]) + _mm512_unpackhi_pd(twos[0], twos[1]);
  const __m512i ascending = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  _mm256_storeu_ps(out, _mm512_cvtpd_ps(_mm512_permutexvar_pd(ascending, sums)));
}
template <>
inline void maxima_of(const Vector<float>* v, float* out) {
  __m512 eights[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = __m512(v[2 * i].part[0]), b = __m512(v[2 * i + 1].part[0]);
    eights[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = eights[2 * i], b = eights[2 * i + 1];
    fours[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  const __m512 twos =
      _mm512_max_ps(_mm512_shuffle_ps(fours[0], fours[1], 0x44), _mm512_shuffle_ps(fours[0], fours[1], 0xee));
  const __m512 maxima = _mm512_max_ps(twos, _mm512_permute_ps(twos, 0xb1));
  const __m512i ascending = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(ascending, maxima)));
}
#endif

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
    result = v > highest ? __builtin_huge_valf() - N{} : result;
    result = v < lowest ? N{} : result;
    out.part[p] = v == v ? result : v;
  }
  return out;
}

inline Vector<double> exponential(const Vector<double>& x) {
  double lanes[8];
  memcpy(lanes, &x, sizeof(lanes));
  for (double& lane : lanes) lane = __builtin_exp(lane);
  Vector<double> out;
  memcpy(&out, lanes, sizeof(out));
  return out;
}

template <class A>
inline Vector<A> sigmoid(const Vector<A>& x) {
  const Vector<A> one = broadcast(A(1));
  return one / (one + exponential(Vector<A>{} - x));
}

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
