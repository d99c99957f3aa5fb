// threadIdx, blockIdx, blockDim, gridDim: 32-bit indices whose sums, products and shifts are checked. On the device
// they wrap silently. An operand of 64 bits makes the result one of 64 bits, as in C++.
#pragma once

#include <cstdint>
#include <functional>
#include <type_traits>

#include "report.h"

namespace simt {

class Index {
 public:
  Index() = default;
  explicit constexpr Index(uint32_t value) : value_(value) {}
  constexpr operator uint32_t() const { return value_; }

 private:
  uint32_t value_;
};

struct Index3 {
  Index x, y, z;
};

// What takes part in arithmetic in place of an Index.
template <class T>
using Plain = std::conditional_t<std::is_same_v<T, Index>, uint32_t, T>;

template <class A, class B>
constexpr bool kIndexArithmetic = (std::is_same_v<A, Index> || std::is_same_v<B, Index>) &&
                                  std::is_integral_v<Plain<A>> && std::is_integral_v<Plain<B>>;

struct ShiftLeft {
  template <class A, class B>
  auto operator()(A a, B b) const {
    return a << b;
  }
};

template <class A, class B, class Operation>
auto checked(A a, B b, const char* sign, Operation operation) {
  using Common = std::common_type_t<Plain<A>, Plain<B>>;
  if constexpr (sizeof(Common) > sizeof(uint32_t)) {
    return operation(static_cast<Common>(a), static_cast<Common>(b));
  } else {
    using Exact = __int128;
    const Exact exact = operation(Exact(Plain<A>(a)), Exact(Plain<B>(b)));
    // A negative result is what `int(threadIdx.x - 1)` relies on.
    if (exact > Exact(UINT32_MAX) || exact < Exact(INT32_MIN))
      fail("32-bit overflow: %lld %s %lld", static_cast<long long>(a), sign, static_cast<long long>(b));
    return Index(static_cast<uint32_t>(exact));
  }
}

template <class A, class B, std::enable_if_t<kIndexArithmetic<A, B>, int> = 0>
auto operator+(A a, B b) {
  return checked(a, b, "+", std::plus<>());
}
template <class A, class B, std::enable_if_t<kIndexArithmetic<A, B>, int> = 0>
auto operator*(A a, B b) {
  return checked(a, b, "*", std::multiplies<>());
}
template <class A, class B, std::enable_if_t<kIndexArithmetic<A, B>, int> = 0>
auto operator<<(A a, B b) {
  return checked(a, b, "<<", ShiftLeft());
}

}  // namespace simt
