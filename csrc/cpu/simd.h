// Vectorisation for the CPU kernels: function clones per instruction set, element conversion.
#pragma once
#include <cmath>
#include <cstdint>

#include "math/scalar.h"

// The function is compiled once per level of the instruction set and the loader picks one. (Named processors would be
// picked only where they are that very model.) OpenMP regions are outlined before the clones are made, so the parallel
// loop stands outside and calls a cloned function on a row range.
#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(RLHF_FAST_NO_CLONES)
#define RLHF_CLONES
#elif !defined(__clang__) && __GNUC__ >= 12
#define RLHF_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RLHF_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif

namespace rlhf {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// The type in which an element type is computed.
template <typename T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

RLHF_INLINE float load(const float& x) { return x; }
RLHF_INLINE double load(const double& x) { return x; }
RLHF_INLINE float load(const bf16& x) { return bits_to_float(uint32_t(x.bits) << 16); }
RLHF_INLINE float load(const f16& x) {
  // Branch-free: normal numbers by exponent shift, subnormals through a float subtraction.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  const uint32_t normal = (body << 13) + (112u << 23);
  const uint32_t special = (body << 13) + (224u << 23);  // inf and NaN
  const float subnormal = bits_to_float((body << 13) + (113u << 23)) - bits_to_float(113u << 23);
  uint32_t magnitude = body >= 0x7c00u ? special : normal;
  magnitude = body < 0x0400u ? float_to_bits(subnormal) : magnitude;
  return bits_to_float(magnitude | sign);
}

RLHF_INLINE void store(float& out, float x) { out = x; }
RLHF_INLINE void store(double& out, double x) { out = x; }
RLHF_INLINE void store(bf16& out, float x) {  // round to nearest even, NaN stays NaN
  const uint32_t u = float_to_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
RLHF_INLINE void store(f16& out, float x) {  // round to nearest even, 65520 and more become inf
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  const uint32_t normal = (body - (112u << 23) + 0xfffu + ((body >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds a value below 2^-14 to a multiple of 2^-24, which then stands in the last bits.
  const uint32_t subnormal = float_to_bits(bits_to_float(body) + 0.5f) - float_to_bits(0.5f);
  uint32_t half = body < (113u << 23) ? subnormal : normal;
  half = body >= (143u << 23) ? (body > 0x7f800000u ? 0x7e00u : 0x7c00u) : half;
  out.bits = uint16_t(half | sign);
}

}  // namespace rlhf
