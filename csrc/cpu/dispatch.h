// Which function a call takes: by the type of its elements, by the name of a variant.
#pragma once
#include <map>
#include <stdexcept>
#include <string>

#include "cpu/simd.h"
#include "native.h"

// X(T) for every element type. Clones per instruction set cannot be made of a template: a kernel has an overload for each
// type, which its first argument picks.
#define RLHF_FOR_DTYPES(X) X(float) X(double) X(bf16) X(f16)

namespace rlhf::cpu {

// f(T()) for the element type T of `dtype`.
template <typename F> void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
  }
}

// table.at(name), or std::invalid_argument that says what there is no native one of.
template <typename T>
const T& named(const std::map<std::string, T>& table, const std::string& what, const std::string& name) {
  const auto entry = table.find(name);
  if (entry == table.end()) throw std::invalid_argument("no native " + what + " " + name);
  return entry->second;
}

}  // namespace rlhf::cpu
