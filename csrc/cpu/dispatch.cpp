// Chooses the kernels' capability when the first operation runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace cbam_fused::cpu {

#define CBAM_DECLARE_TABLES(capability)     \
  namespace capability {                    \
  extern const Kernels<float> kFloat;       \
  extern const Kernels<double> kDouble;     \
  extern const Kernels<Half> kHalf;         \
  extern const Kernels<BFloat16> kBFloat16; \
  }
CBAM_DECLARE_TABLES(baseline)
CBAM_DECLARE_TABLES(avx2)
CBAM_DECLARE_TABLES(avx512)

namespace {

enum class Capability { kBaseline, kAvx2, kAvx512 };

Capability supported() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kBaseline;
}

Capability capability() {
  static const Capability chosen = [] {
    const Capability best = supported();
    const char* asked = std::getenv("CBAM_FUSED_CPU_CAPABILITY");
    if (asked && !std::strcmp(asked, "baseline")) return Capability::kBaseline;
    if (asked && !std::strcmp(asked, "avx2") && best != Capability::kBaseline) return Capability::kAvx2;
    return best;
  }();
  return chosen;
}

template <class T>
const Kernels<T>& choose(const Kernels<T>& baseline, const Kernels<T>& avx2, const Kernels<T>& avx512) {
  switch (capability()) {
    case Capability::kAvx512:
      return avx512;
    case Capability::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace

template <>
const Kernels<float>& kernels() {
  return choose(baseline::kFloat, avx2::kFloat, avx512::kFloat);
}
template <>
const Kernels<double>& kernels() {
  return choose(baseline::kDouble, avx2::kDouble, avx512::kDouble);
}
template <>
const Kernels<Half>& kernels() {
  return choose(baseline::kHalf, avx2::kHalf, avx512::kHalf);
}
template <>
const Kernels<BFloat16>& kernels() {
  return choose(baseline::kBFloat16, avx2::kBFloat16, avx512::kBFloat16);
}

const char* cpu_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace cbam_fused::cpu
