// Loads and stores of whole vectors and of their first lanes, with the conversion between memory and compute type.
#pragma once

#include "simd.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

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

// The default NaN for any NaN; other values as they are.
template <class N>
inline N default_nan(N v) {
  return v == v ? v : __builtin_nanf("") - N{};
}

// The nearest bfloat16, ties to even, in the upper half of each word, by adding half of the last place kept. The lower
// half is left as it comes. That of a NaN must be zero, or the addition could carry into its sign.
inline Native<uint32_t> round_upper(Native<float> v) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(__m512(v));
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  return Native<uint32_t>(_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1)));
#else
  Native<uint32_t> bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits + ((bits >> 16 & 1) + 0x7fff);
#endif
}

#if defined(__AVX512F__)

// ---- AVX-512: masked, in registers ----------------------------------------------------------------------------------

inline Vector<float> widen(__m256i bits, Half) { return {{Native<float>(_mm512_cvtph_ps(bits))}}; }
inline Vector<float> widen(__m256i bits, BFloat16) {
  return {{Native<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)))}};
}
inline __m256i narrow(const Vector<float>& v, Half) {
  return _mm512_cvtps_ph(__m512(v.part[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i narrow(const Vector<float>& v, BFloat16) {
  const __m512i upper_halves = _mm512_set_epi16(31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 31, 29,
                                                27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_halves, __m512i(round_upper(default_nan(v.part[0])))));
}
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }

inline Vector<float> load(const Half* source) { return widen(_mm256_loadu_si256((const __m256i*)source), Half()); }
inline Vector<float> load(const BFloat16* source) {
  return widen(_mm256_loadu_si256((const __m256i*)source), BFloat16());
}
inline void store(Half* target, const Vector<float>& v) { _mm256_storeu_si256((__m256i*)target, narrow(v, Half())); }
inline void store(BFloat16* target, const Vector<float>& v) {
  _mm256_storeu_si256((__m256i*)target, narrow(v, BFloat16()));
}

template <class T>
inline Vector<Compute<T>> load_first(const T* source, int64_t count) {
  const __mmask16 lanes = first_lanes(count);
  if constexpr (sizeof(T) == 8)
    return {{Native<double>(_mm512_maskz_loadu_pd(__mmask8(lanes), source))}};
  else if constexpr (sizeof(T) == 4)
    return {{Native<float>(_mm512_maskz_loadu_ps(lanes, source))}};
  else
    return widen(_mm256_maskz_loadu_epi16(lanes, source), T());
}
template <class T>
inline void store_first(T* target, const Vector<Compute<T>>& v, int64_t count) {
  const __mmask16 lanes = first_lanes(count);
  if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(target, __mmask8(lanes), __m512d(v.part[0]));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(target, lanes, __m512(v.part[0]));
  else
    _mm256_mask_storeu_epi16(target, lanes, narrow(v, T()));
}

// Indices and counts are lanes as wide as the values, but int32 in memory.
template <class A>
inline Vector<Index<A>> load_indices(const int32_t* source, int64_t count) {
  const __mmask16 lanes = first_lanes(count);
  if constexpr (sizeof(A) == 8)
    return {{Native<int64_t>(_mm512_cvtepi32_epi64(_mm256_maskz_loadu_epi32(__mmask8(lanes), source)))}};
  else
    return {{Native<int32_t>(_mm512_maskz_loadu_epi32(lanes, source))}};
}
template <class A>
inline void store_indices(int32_t* target, const Vector<Index<A>>& v, int64_t count) {
  const __mmask16 lanes = first_lanes(count);
  if constexpr (sizeof(A) == 8)
    _mm256_mask_storeu_epi32(target, __mmask8(lanes), _mm512_cvtepi64_epi32(__m512i(v.part[0])));
  else
    _mm512_mask_storeu_epi32(target, lanes, __m512i(v.part[0]));
}

#else

// ---- Other capabilities: the first lanes by way of an array ---------------------------------------------------------

#if defined(__AVX2__)
constexpr int kPiece = 8;  // 16-bit values converted at once

inline void widen(const Half* source, float* target) {
  _mm256_storeu_ps(target, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source)));
}
inline void narrow(const float* source, Half* target) {
  _mm_storeu_si128((__m128i*)target,
                   _mm256_cvtps_ph(_mm256_loadu_ps(source), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
constexpr int kPiece = 1;

inline void widen(const Half* source, float* target) {
  const uint32_t half = source->bits, exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  const float subnormal = float(fraction) * 0x1p-24f;
  uint32_t bits;
  memcpy(&bits, &subnormal, 4);
  if (exponent == 31)
    bits = 0x7f800000u | fraction << 13 | uint32_t(fraction != 0) << 22;
  else if (exponent != 0)
    bits = (exponent + 112) << 23 | fraction << 13;
  bits |= (half & 0x8000) << 16;
  memcpy(target, &bits, 4);
}
inline void narrow(const float* source, Half* target) {
  uint32_t bits;
  memcpy(&bits, source, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {  // NaN, made quiet
    half = 0x7e00 | (bits >> 13 & 0x3ff);
  } else if (bits >= 0x477ff000) {  // rounds to infinity
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // zero or subnormal: adding 0.5 aligns the fraction and rounds it
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    half = bits - 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  target->bits = uint16_t(sign | half);
}
#endif

inline Vector<float> load(const Half* source) {
  float lanes[16];
  for (int i = 0; i < 16; i += kPiece) widen(source + i, lanes + i);
  return load(lanes);
}
inline void store(Half* target, const Vector<float>& v) {
  float lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; i += kPiece) narrow(lanes + i, target + i);
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
    const NativeBits16 narrow = __builtin_convertvector(round_upper(default_nan(v.part[p])) >> 16, NativeBits16);
    memcpy(target + p * kNativeFloats, &narrow, sizeof(narrow));
  }
}

template <class T>
inline Vector<Compute<T>> load_first(const T* source, int64_t count) {
  T lanes[Vector<Compute<T>>::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
}
template <class T>
inline void store_first(T* target, const Vector<Compute<T>>& v, int64_t count) {
  T lanes[Vector<Compute<T>>::kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
}

template <class A>
inline Vector<Index<A>> load_indices(const int32_t* source, int64_t count) {
  Index<A> lanes[Vector<A>::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
}
template <class A>
inline void store_indices(int32_t* target, const Vector<Index<A>>& v, int64_t count) {
  Index<A> lanes[Vector<A>::kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) target[i] = int32_t(lanes[i]);
}

#endif

// ---- Two vectors at a time ------------------------------------------------------------------------------------------

// Two vectors' worth of consecutive columns. For a bfloat16 row the first has the even columns and the second the odd
// ones, the two halves of each 32-bit word, because that needs no shuffle; for other types one follows the other.
template <class A>
struct Pair {
  Vector<A> part[2];
};

template <class T>
constexpr bool kInterleaved = false;
template <>
constexpr bool kInterleaved<BFloat16> = true;

template <class T>
inline Pair<Compute<T>> load_pair(const T* source) {
  return {{load(source), load(source + Vector<Compute<T>>::kLanes)}};
}
inline Pair<float> load_pair(const BFloat16* source) {
  Pair<float> out;
  for (int p = 0; p < kParts; ++p) {
    Native<uint32_t> words;
    memcpy(&words, reinterpret_cast<const char*>(source) + p * kNativeBytes, sizeof(words));
    const Native<uint32_t> even = words << 16, odd = words & 0xffff0000u;
    memcpy(&out.part[0].part[p], &even, sizeof(even));
    memcpy(&out.part[1].part[p], &odd, sizeof(odd));
  }
  return out;
}

// Where a value is NaN, the lower half of its word must be zero if T is bfloat16.
template <class T>
inline void store_pair(T* target, const Pair<Compute<T>>& v) {
  store(target, v.part[0]);
  store(target + Vector<Compute<T>>::kLanes, v.part[1]);
}
inline void store_pair(BFloat16* target, const Pair<float>& v) {
  for (int p = 0; p < kParts; ++p) {
    const Native<uint32_t> even = round_upper(v.part[0].part[p]), odd = round_upper(v.part[1].part[p]);
    const Native<uint32_t> words = even >> 16 | (odd & 0xffff0000u);
    memcpy(reinterpret_cast<char*>(target) + p * kNativeBytes, &words, sizeof(words));
  }
}

template <int first, int step, int skip, class N, int... I>
inline N pick(N a, N b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (first + (step == 1 ? 2 * I : I / 2 + I % 2 * skip))...);
}

// Values of columns, in the order in which a row of T is loaded; and back.
template <class T, class A>
inline Pair<A> load_columns(const A* source) {
  const Vector<A> first = load(source), second = load(source + Vector<A>::kLanes);
  if constexpr (!kInterleaved<T>) return {{first, second}};
  constexpr int kNativeLanes = kNativeBytes / int(sizeof(A));
  using L = typename MakeLanes<kNativeLanes>::type;
  const auto native = [&](int i) { return i < kParts ? first.part[i] : second.part[i - kParts]; };
  Pair<A> out;
  for (int p = 0; p < kParts; ++p) {
    out.part[0].part[p] = pick<0, 1, 0>(native(2 * p), native(2 * p + 1), L());
    out.part[1].part[p] = pick<1, 1, 0>(native(2 * p), native(2 * p + 1), L());
  }
  return out;
}
template <class T, class A>
inline Pair<A> in_columns(const Pair<A>& v) {
  if constexpr (!kInterleaved<T>) return v;
  constexpr int kNativeLanes = kNativeBytes / int(sizeof(A));
  using L = typename MakeLanes<kNativeLanes>::type;
  Pair<A> out;
  for (int i = 0; i < 2 * kParts; ++i) {
    const Native<A> even = v.part[0].part[i / 2], odd = v.part[1].part[i / 2];
    out.part[i / kParts].part[i % kParts] =
        i % 2 == 0 ? pick<0, 2, kNativeLanes>(even, odd, L()) : pick<kNativeLanes / 2, 2, kNativeLanes>(even, odd, L());
  }
  return out;
}
// Values of columns that many rows use, put into that order once; NaN is made the default one.
template <class T>
class ColumnValues {
 public:
  using A = Compute<T>;
  static constexpr int64_t kMost = 8192, kLanes = Vector<A>::kLanes;  // columns

  ColumnValues(const A* values, int64_t columns) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
      const Pair<A> pair = load_columns<T>(values + j);
      for (int part = 0; part < 2; ++part) {
        Vector<A> v = pair.part[part];
        for (auto& native : v.part) native = default_nan(native);
        store(ordered_ + j + part * kLanes, v);
      }
    }
  }
  // Of the pair of columns that begins at `column`.
  Pair<A> operator[](int64_t column) const { return {{load(ordered_ + column), load(ordered_ + column + kLanes)}}; }

 private:
  A ordered_[kMost];
};

// The columns' own numbers, from `column` on, in that order.
template <class T>
inline Pair<Index<Compute<T>>> column_indices(int64_t column) {
  using I = Index<Compute<T>>;
  const Vector<I> lane = iota<I>(), start = broadcast(I(column));
  if constexpr (!kInterleaved<T>) return {{lane + start, lane + broadcast(I(column + Vector<I>::kLanes))}};
  const Vector<I> even = lane + lane + start;
  return {{even, even + broadcast(I(1))}};
}

// ---- Prefetching ----------------------------------------------------------------------------------------------------

// A walk through memory asks for what it reads, or writes, a little later: the hardware's own prefetching stops at each
// page.
constexpr int64_t kPrefetchBytes = 4096;
template <class T>
constexpr int64_t kPrefetch = kPrefetchBytes / int64_t(sizeof(T));

// The lines of what load_pair or store_pair will touch `ahead` elements further on.
template <class T>
inline void prefetch_read(const T* source, int64_t ahead) {
  for (int64_t i = 0; i < 2 * Vector<Compute<T>>::kLanes; i += 64 / sizeof(T))
    __builtin_prefetch(source + i + ahead, 0, 2);
}
template <class T>
inline void prefetch_write(T* target, int64_t ahead) {
  for (int64_t i = 0; i < 2 * Vector<Compute<T>>::kLanes; i += 64 / sizeof(T))
    __builtin_prefetch(target + i + ahead, 1, 2);
}

// ---- A run of columns -----------------------------------------------------------------------------------------------

// The first `count` lanes of a vector, the others zero; a compile-time count of all lanes folds to a plain load.
template <class T>
inline Vector<Compute<T>> load_some(const T* source, int64_t count) {
  return count == Vector<Compute<T>>::kLanes ? load(source) : load_first(source, count);
}
template <class T>
inline void store_some(T* target, const Vector<Compute<T>>& v, int64_t count) {
  count == Vector<Compute<T>>::kLanes ? store(target, v) : store_first(target, v, count);
}

// body(column, count) for each vector of [begin, end); only the last count may be less than kLanes.
template <int kLanes, class F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, F body) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) body(j, int64_t(kLanes));
  if (j < end) body(j, end - j);
}

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
