// The only file that knows Python. Tensors arrive as raw addresses (0 = absent), sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cpu/distributional_value_loss.h"
#include "cpu/few_rows.h"
#include "cpu/gae.h"
#include "cpu/group_advantages.h"
#include "cpu/kl_estimate.h"
#include "cpu/linear_value_loss.h"
#include "cpu/lora_linear.h"
#include "cpu/losses.h"
#include "cpu/ranking_loss.h"
#include "cpu/pages.h"
#include "cpu/sample_tokens.h"
#include "cpu/policy_loss.h"
#include "cpu/program.h"
#include "cpu/shaped_rewards.h"
#include "cpu/slot_attention.h"
#include "cpu/token_kl.h"
#include "cpu/token_logprobs.h"
#include "cpu/vtrace.h"
#include "cpu/whiten.h"
#if defined(RLHF_FAST_WITH_CUDA)
#include "cuda/gae.h"
#include "cuda/token_logprobs.h"
#endif

namespace py = pybind11;
using namespace rlhf;

// A NamedTuple of Python as a struct, field by field by its name.
template <> struct py::detail::type_caster<cpu::PolicyNumbers> {
  PYBIND11_TYPE_CASTER(cpu::PolicyNumbers, const_name("Numbers"));
  bool load(handle source, bool) {
#define RLHF_READ(NAME) \
  static PyObject* const NAME##_ = PyUnicode_InternFromString(#NAME); \
  value.NAME = py::cast<decltype(value.NAME)>(source.attr(NAME##_));
    RLHF_POLICY_NUMBERS(RLHF_READ)
    RLHF_READ(function) RLHF_READ(needs_sequences) RLHF_READ(marks_tokens) RLHF_READ(kl_variant) RLHF_READ(kl_unbiased)
    RLHF_READ(correction_level) RLHF_READ(correction_mode)
#undef RLHF_READ
    return true;
  }
};

namespace {

using Address = uintptr_t;
using RowSizes = std::array<int64_t, 4>;  // outer, inner, outer_stride, inner_stride
using Release = py::call_guard<py::gil_scoped_release>;

template <typename T = void> T* at(Address address) { return reinterpret_cast<T*>(address); }
Rows rows(const RowSizes& s) { return {s[0], s[1], s[2], s[3]}; }

// temperature, temperatures (or 0), logit_scale, softcap
using TransformArguments = std::tuple<double, Address, double, double>;
// logprobs, entropy, row_max, row_logsum, sum_p_squared
using StatsArguments = std::array<Address, 5>;

Transform transform(const TransformArguments& t) {
  return {.temperature = std::get<0>(t), .temperatures = at<float>(std::get<1>(t)), .logit_scale = std::get<2>(t),
          .softcap = std::get<3>(t)};
}

cpu::TokenLogprobs token_logprobs(Address logits, int dtype, const RowSizes& sizes, int64_t vocabulary, Address targets,
                                  int64_t targets_per_row, Address mask, const TransformArguments& t,
                                  const StatsArguments& stats) {
  return {.logits = at<>(logits), .dtype = DType(dtype), .rows = rows(sizes), .vocabulary = vocabulary,
          .targets = at<int64_t>(targets), .targets_per_row = targets_per_row, .mask = at<uint8_t>(mask),
          .transform = transform(t), .logprobs = at<>(stats[0]), .entropy = at<>(stats[1]),
          .row_max = at<>(stats[2]), .row_logsum = at<>(stats[3]), .sum_p_squared = at<>(stats[4])};
}

// number of sequences, time, mask, cu_seqlens, bootstrap
using SequencesArguments = std::tuple<int64_t, int64_t, Address, Address, Address>;
cpu::Sequences sequences(const SequencesArguments& s) {
  return {.count = std::get<0>(s), .time = std::get<1>(s), .mask = at<uint8_t>(std::get<2>(s)),
          .cu_seqlens = at<int64_t>(std::get<3>(s)), .bootstrap = at<>(std::get<4>(s))};
}

// strides = reward_stride, value_stride; rates = gamma, lam, value_lam; outputs = advantages (or 0), returns
cpu::Gae gae_call(Address rewards, Address values, int dtype, const std::array<int64_t, 2>& strides,
                  const SequencesArguments& s, const std::array<double, 3>& rates, Address lams, bool decoupled,
                  const std::array<Address, 2>& outputs) {
  return {.rewards = at<>(rewards), .values = at<>(values), .dtype = DType(dtype), .reward_stride = strides[0],
          .value_stride = strides[1], .sequences = sequences(s), .gamma = rates[0], .lam = rates[1],
          .value_lam = rates[2], .lams = at<double>(lams), .decoupled = decoupled, .advantages = at<>(outputs[0]),
          .returns = at<>(outputs[1])};
}

// --- Tensors as they are, for what is called with few numbers: each step of Python costs as much as a hundred of them ---

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
// A name is made an object once, in each place.
#define RLHF_NAME(NAME) ([] { static PyObject* const name = PyUnicode_InternFromString(NAME); return name; }())
#define RLHF_CALLED(OBJECT, METHOD) checked(PyObject_CallMethodNoArgs((OBJECT).ptr(), RLHF_NAME(METHOD)))

// Throws ValueError where memory holds no elements, or not these but their negatives.
void* address_of(py::handle tensor) {
  const auto address = RLHF_CALLED(tensor, "data_ptr").cast<Address>();
  if (RLHF_CALLED(tensor, "is_neg").ptr() == Py_True || (!address && RLHF_CALLED(tensor, "numel").cast<int64_t>()))
    throw py::value_error("a kernel takes a tensor whose elements are in memory");
  return at<>(address);
}

DType dtype_of(py::handle tensor) {
  static const auto types = [] {
    std::array<PyObject*, 4> found;
    const auto torch = py::module_::import("torch");
    const char* const names[] = {"float32", "float64", "bfloat16", "float16"};  // in the order of DType
    for (int i = 0; i < 4; ++i) found[i] = py::object(torch.attr(names[i])).release().ptr();
    return found;
  }();
  const py::object dtype = checked(PyObject_GetAttr(tensor.ptr(), RLHF_NAME("dtype")));
  const auto place = std::find(types.begin(), types.end(), dtype.ptr());
  if (place == types.end()) throw py::type_error("a kernel takes a tensor of floats");
  return DType(place - types.begin());
}

// The address of a contiguous tensor; null for None.
void* packed(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  if (RLHF_CALLED(tensor, "is_contiguous").ptr() != Py_True)
    throw py::value_error("a kernel takes a contiguous tensor");
  return address_of(tensor);
}

// (rows, columns), or (columns,) as one row, or () for all elements.
cpu::Plane plane_of(py::handle tensor) {
  const auto strides = py::reinterpret_borrow<py::tuple>(RLHF_CALLED(tensor, "stride"));
  const size_t n = strides.size();
  return {address_of(tensor), dtype_of(tensor), n > 1 ? strides[0].cast<int64_t>() : 0,
          n > 0 ? strides[n - 1].cast<int64_t>() : 0};
}

// address, type code, row stride, column stride
using PlaneArguments = std::tuple<Address, int, int64_t, int64_t>;
cpu::Plane plane(const PlaneArguments& p) {
  return {at<>(std::get<0>(p)), DType(std::get<1>(p)), std::get<2>(p), std::get<3>(p)};
}

// sizes = width, wide row stride, narrow row stride; bank: matrix, rank, scale
using LowRankArguments = std::tuple<PlaneArguments, int64_t, double>;
cpu::LoraLinear lora_linear(Address wide, Address narrow, int dtype, const std::array<int64_t, 3>& sizes,
                            const std::vector<LowRankArguments>& bank,
                            const std::vector<std::array<int64_t, 3>>& spans) {
  cpu::LoraLinear op{.wide = at<>(wide), .narrow = at<>(narrow), .dtype = DType(dtype), .width = sizes[0],
                     .wide_stride = sizes[1], .narrow_stride = sizes[2], .bank = {}, .spans = {}};
  for (const auto& [matrix, rank, scale] : bank) op.bank.push_back({plane(matrix), rank, scale});
  for (const auto& [adapter, start, stop] : spans) op.spans.push_back({adapter, start, stop});
  return op;
}

// sizes = width, outputs, row stride of the weight; bank: A, B, rank, scale
using AdapterArguments = std::tuple<PlaneArguments, PlaneArguments, int64_t, double>;
cpu::FewRows few_rows(int dtype, const std::array<int64_t, 3>& sizes, const std::vector<AdapterArguments>& bank,
                      const std::vector<std::array<int64_t, 3>>& spans) {
  cpu::FewRows op{.dtype = DType(dtype), .width = sizes[0], .outer = sizes[1], .weight_stride = sizes[2], .bank = {},
                  .spans = {}};
  for (const auto& [down, up, rank, scale] : bank) op.bank.push_back({plane(down), plane(up), rank, scale});
  for (const auto& [adapter, start, stop] : spans) op.spans.push_back({adapter, start, stop});
  return op;
}

// stats = kl, mean, logsum, ref_logsum
cpu::TokenKl token_kl(Address logits, Address ref_logits, int dtype, const RowSizes& sizes, const RowSizes& ref_sizes,
                      int64_t vocabulary, Address mask, const TransformArguments& t, double js_weight,
                      const std::array<Address, 4>& stats) {
  return {.logits = at<>(logits), .ref_logits = at<>(ref_logits), .dtype = DType(dtype), .rows = rows(sizes),
          .ref_rows = rows(ref_sizes), .vocabulary = vocabulary, .mask = at<uint8_t>(mask),
          .transform = transform(t), .js_weight = js_weight, .logsum = at<>(stats[2]), .ref_logsum = at<>(stats[3]),
          .kl = at<>(stats[0]), .mean = at<>(stats[1])};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of rlhf_fast; the Python side in rlhf_fast/ops checks every argument first.";
#if defined(RLHF_FAST_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  m.def(
      "prefer_huge_pages", [](Address data, int64_t bytes) { cpu::prefer_huge_pages(at<>(data), bytes); }, Release());

  m.def(
      "token_logprobs_forward",
      [](Address logits, int dtype, RowSizes sizes, int64_t vocabulary, Address targets, int64_t targets_per_row,
         Address mask, TransformArguments t, StatsArguments stats, Address gradient, int threads) {
        cpu::token_logprobs_forward(
            token_logprobs(logits, dtype, sizes, vocabulary, targets, targets_per_row, mask, t, stats),
            at<>(gradient), threads);
      },
      Release());
  m.def(
      "token_logprobs_backward",
      [](Address logits, int dtype, RowSizes sizes, int64_t vocabulary, Address targets, int64_t targets_per_row,
         Address mask, TransformArguments t, StatsArguments stats, Address grad_logprobs, Address grad_entropy,
         Address grad_lse, Address gradient, RowSizes gradient_sizes, int threads) {
        cpu::token_logprobs_backward(
            token_logprobs(logits, dtype, sizes, vocabulary, targets, targets_per_row, mask, t, stats),
            at<>(grad_logprobs), at<>(grad_entropy), at<>(grad_lse), at<>(gradient), rows(gradient_sizes), threads);
      },
      Release());
#if defined(RLHF_FAST_WITH_CUDA)
  m.def(
      "token_logprobs_forward_cuda",
      [](Address logits, int dtype, RowSizes sizes, int64_t vocabulary, Address targets, int64_t targets_per_row,
         Address mask, TransformArguments t, StatsArguments stats, Address gradient, int device,
         Address stream) {
        cuda::token_logprobs_forward(
            token_logprobs(logits, dtype, sizes, vocabulary, targets, targets_per_row, mask, t, stats),
            at<>(gradient), device, stream);
      },
      Release());
  m.def(
      "token_logprobs_backward_cuda",
      [](Address logits, int dtype, RowSizes sizes, int64_t vocabulary, Address targets, int64_t targets_per_row,
         Address mask, TransformArguments t, StatsArguments stats, Address grad_logprobs, Address grad_entropy,
         Address grad_lse, Address gradient, RowSizes gradient_sizes, int device, Address stream) {
        cuda::token_logprobs_backward(
            token_logprobs(logits, dtype, sizes, vocabulary, targets, targets_per_row, mask, t, stats),
            at<>(grad_logprobs), at<>(grad_entropy), at<>(grad_lse), at<>(gradient), rows(gradient_sizes), device,
            stream);
      },
      Release());
#endif

  m.def(
      "gae",
      [](Address rewards, Address values, int dtype, std::array<int64_t, 2> strides, const SequencesArguments& s,
         std::array<double, 3> rates, Address lams, bool decoupled, std::array<Address, 2> outputs, int threads) {
        return cpu::gae(gae_call(rewards, values, dtype, strides, s, rates, lams, decoupled, outputs), threads);
      },
      Release());
#if defined(RLHF_FAST_WITH_CUDA)
  m.def(
      "gae_cuda",
      [](Address rewards, Address values, int dtype, std::array<int64_t, 2> strides, const SequencesArguments& s,
         std::array<double, 3> rates, Address lams, bool decoupled, std::array<Address, 2> outputs, int device,
         Address stream) {
        cuda::gae(gae_call(rewards, values, dtype, strides, s, rates, lams, decoupled, outputs), device, stream);
      },
      Release());
#endif

  // strides = rewards, values, logprobs, sampler_logprobs; rates = gamma, lam, rho_clip, c_clip;
  // outputs = advantages, value targets
  m.def(
      "vtrace",
      [](std::array<Address, 4> inputs, int dtype, std::array<int64_t, 4> strides, const SequencesArguments& s,
         std::array<double, 4> rates, std::array<Address, 2> outputs, int threads) {
        return cpu::vtrace({.inputs = {at<>(inputs[0]), at<>(inputs[1]), at<>(inputs[2]), at<>(inputs[3])},
                            .dtype = DType(dtype), .strides = {strides[0], strides[1], strides[2], strides[3]},
                            .sequences = sequences(s), .gamma = rates[0], .lam = rates[1], .rho_clip = rates[2],
                            .c_clip = rates[3], .advantages = at<>(outputs[0]), .targets = at<>(outputs[1])},
                           threads);
      },
      Release());

  // numbers = the name of a functor of math/losses.h and its parameters; inputs: tensors, or None, for which `absent` has
  // a number, or which the functor does not read; over = mask, denominator; outputs = loss, metrics, coefficients
  m.def("masked_loss", [](const py::tuple& numbers, const py::tuple& inputs, const py::tuple& absent,
                          const py::tuple& over, const py::list& outputs, int threads) {
    std::vector<double> elsewhere(inputs.size());
    const auto sizes = py::reinterpret_borrow<py::tuple>(RLHF_CALLED(py::object(inputs[0]), "size"));
    cpu::Loss op{.inputs = {}, .mask = static_cast<const uint8_t*>(packed(over[0])), .denominator = packed(over[1]),
                 .parameters = {}, .rows = 1, .columns = 1, .is_double = dtype_of(outputs[0]) == DType::f64,
                 .loss = packed(outputs[0]), .metrics = packed(outputs[1]),
                 .metric_count = RLHF_CALLED(py::object(outputs[1]), "numel").cast<int>(), .coefficients = {}};
    for (const auto& size : sizes) op.rows *= op.columns, op.columns = size.cast<int64_t>();
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (!inputs[k].is_none()) op.inputs.push_back(plane_of(inputs[k]));
      else if (!absent.empty()) {
        elsewhere[k] = absent[k - inputs.size() + absent.size()].cast<double>();
        op.inputs.push_back({&elsewhere[k], DType::f64, 0, 0});
      }
    }
    for (size_t k = 1; k < numbers.size(); ++k) op.parameters.push_back(numbers[k].cast<double>());
    for (size_t k = 2; k < outputs.size(); ++k) op.coefficients.push_back(packed(outputs[k]));
    const auto variant = numbers[0].cast<std::string>();
    const py::gil_scoped_release release;
    cpu::masked_loss(variant, op, threads);
  });
  // planes = the inputs and the weights; sizes = rows, columns, sequences; outputs = loss, metrics, the coefficients
  m.def(
      "policy_loss",
      [](const std::array<PlaneArguments, 7>& planes, Address flags, Address cu_seqlens, Address denominator,
         std::array<int64_t, 3> sizes, const cpu::PolicyNumbers& numbers, bool is_double,
         const std::vector<Address>& outputs, int threads) {
        cpu::policy_loss({.logprobs = plane(planes[0]), .old_logprobs = plane(planes[1]),
                          .advantages = plane(planes[2]), .ref_logprobs = plane(planes[3]),
                          .sampler_logprobs = plane(planes[4]), .entropy = plane(planes[5]),
                          .weights = plane(planes[6]), .flags = at<uint8_t>(flags),
                          .cu_seqlens = at<int64_t>(cu_seqlens), .denominator = at<>(denominator), .rows = sizes[0],
                          .columns = sizes[1], .sequences = sizes[2], .numbers = numbers, .is_double = is_double,
                          .loss = at<>(outputs[0]), .metrics = at<>(outputs[1]), .coefficient = at<>(outputs[2]),
                          .entropy_coefficient = outputs.size() > 3 ? at<>(outputs[3]) : nullptr},
                         threads);
      },
      Release());
  // outputs = losses and accuracies of the groups, gradient
  m.def(
      "ranking_loss",
      [](const std::string& variant, Address rewards, int dtype, Address ranks, Address order, Address offsets,
         int64_t group_size, int64_t groups, Address denominator, std::array<Address, 3> outputs, int threads) {
        cpu::ranking_loss(variant,
                          {.rewards = at<>(rewards), .dtype = DType(dtype), .ranks = at<int64_t>(ranks),
                           .order = at<int64_t>(order), .offsets = at<int64_t>(offsets), .group_size = group_size,
                           .groups = groups, .denominator = at<>(denominator), .loss = at<>(outputs[0]),
                           .accuracy = at<>(outputs[1]), .gradient = at<>(outputs[2])},
                          threads);
      },
      Release());
  // clips = log_ratio, value, weight; outputs = value, derivative by logprob, by ref_logprob (or 0)
  m.def(
      "kl_estimate",
      [](const std::string& variant, const std::string& gradient, const std::array<PlaneArguments, 3>& inputs,
         int64_t rows, int64_t columns, std::array<double, 3> clips, bool is_double, std::array<Address, 3> outputs,
         int threads) {
        cpu::kl_estimate(variant, gradient,
                         {.logprobs = plane(inputs[0]), .ref_logprobs = plane(inputs[1]),
                          .old_logprobs = plane(inputs[2]), .rows = rows, .columns = columns,
                          .log_ratio_clip = clips[0], .value_clip = clips[1], .weight_clip = clips[2],
                          .is_double = is_double, .value = at<>(outputs[0]), .by_logprob = at<>(outputs[1]),
                          .by_ref = at<>(outputs[2])},
                         threads);
      },
      Release());

  m.def(
      "token_kl_forward",
      [](const std::string& divergence, Address logits, Address ref_logits, int dtype, RowSizes sizes,
         RowSizes ref_sizes, int64_t vocabulary, Address mask, TransformArguments t, double js_weight,
         std::array<Address, 4> stats, int threads) {
        cpu::token_kl_forward(divergence,
                              token_kl(logits, ref_logits, dtype, sizes, ref_sizes, vocabulary, mask, t,
                                       js_weight, stats),
                              threads);
      },
      Release());
  m.def(
      "token_kl_backward",
      [](const std::string& divergence, Address logits, Address ref_logits, int dtype, RowSizes sizes,
         RowSizes ref_sizes, int64_t vocabulary, Address mask, TransformArguments t, double js_weight,
         std::array<Address, 4> stats, Address grad_kl, Address gradient, RowSizes gradient_sizes, int threads) {
        cpu::token_kl_backward(divergence,
                               token_kl(logits, ref_logits, dtype, sizes, ref_sizes, vocabulary, mask, t,
                                        js_weight, stats),
                               at<>(grad_kl), at<>(gradient), rows(gradient_sizes), threads);
      },
      Release());

  m.def(
      "shaped_rewards",
      [](Address scores, Address kl, int dtype, std::array<int64_t, 3> sizes, Address mask, double kl_coef, double clip,
         Address rewards, int threads) {
        cpu::shaped_rewards({.scores = at<>(scores), .kl = at<>(kl), .dtype = DType(dtype), .batch = sizes[0],
                             .time = sizes[1], .kl_stride = sizes[2], .mask = at<uint8_t>(mask), .kl_coef = kl_coef,
                             .clip = clip, .rewards = at<>(rewards)},
                            threads);
      },
      Release());
  m.def(
      "whiten_moments",
      [](Address x, int dtype, int64_t count, Address mask, Address moments, int64_t parts, int threads) {
        cpu::whiten_moments({.x = at<>(x), .dtype = DType(dtype), .count = count, .mask = at<uint8_t>(mask)},
                            at<double>(moments), parts, threads);
      },
      Release());
  m.def(
      "whiten",
      [](Address x, int dtype, int64_t count, Address mask, Address moments, int64_t parts, bool shift_mean, double eps,
         Address out, int threads) {
        cpu::whiten({.x = at<>(x), .dtype = DType(dtype), .count = count, .mask = at<uint8_t>(mask)},
                    at<double>(moments), parts, shift_mean, eps, at<>(out), threads);
      },
      Release());
  m.def(
      "group_advantages",
      [](Address rewards, int dtype, Address weights, int64_t groups, int64_t group_size, Address order,
         Address offsets, int divisor, double parameter, Address advantages, int threads) {
        cpu::group_advantages({.rewards = at<>(rewards), .dtype = DType(dtype), .weights = at<>(weights),
                               .groups = groups, .group_size = group_size, .order = at<int64_t>(order),
                               .offsets = at<int64_t>(offsets), .divisor = divisor, .parameter = parameter,
                               .advantages = at<>(advantages)},
                              threads);
      },
      Release());

  // sizes = rows, width, row stride; inputs = weight, bias, old_values, returns, mask, denominator;
  // outputs = loss, clip fraction, values, coefficients, weight_sums, bias_sum
  m.def(
      "linear_value_loss",
      [](Address hidden, int dtype, std::array<int64_t, 3> sizes, std::array<Address, 6> inputs, double clip_eps,
         std::array<Address, 6> outputs, int threads) {
        cpu::linear_value_loss({.hidden = at<>(hidden), .dtype = DType(dtype), .rows = sizes[0], .width = sizes[1],
                                .row_stride = sizes[2], .weight = at<>(inputs[0]), .bias = at<>(inputs[1]),
                                .old_values = at<>(inputs[2]), .returns = at<>(inputs[3]),
                                .mask = at<uint8_t>(inputs[4]), .denominator = at<>(inputs[5]),
                                .clip_eps = clip_eps, .loss = at<>(outputs[0]), .clip_fraction = at<>(outputs[1]),
                                .values = at<>(outputs[2]), .coefficients = at<>(outputs[3]),
                                .weight_sums = at<>(outputs[4]), .bias_sum = at<>(outputs[5])},
                               threads);
      },
      Release());
  // sizes = rows, bins, row stride; inputs = returns, mask, denominator; parameters = v_min, v_max, sigma;
  // outputs = loss, outside fraction, values, coefficients
  m.def(
      "distributional_value_loss",
      [](Address logits, int dtype, std::array<int64_t, 3> sizes, std::array<Address, 3> inputs,
         std::array<double, 3> parameters, std::array<Address, 4> outputs, int threads) {
        cpu::distributional_value_loss({.logits = at<>(logits), .dtype = DType(dtype), .rows = sizes[0],
                                        .bins = sizes[1], .row_stride = sizes[2], .returns = at<>(inputs[0]),
                                        .mask = at<uint8_t>(inputs[1]), .denominator = at<>(inputs[2]),
                                        .v_min = parameters[0], .v_max = parameters[1], .sigma = parameters[2],
                                        .loss = at<>(outputs[0]), .outside = at<>(outputs[1]),
                                        .values = at<>(outputs[2]), .coefficients = at<>(outputs[3])},
                                       threads);
      },
      Release());

  // sizes = rows, width, row stride of x, row stride of out
  m.def(
      "lora_dropout",
      [](Address x, Address out, int dtype, std::array<int64_t, 4> sizes, Address seed, uint32_t threshold,
         int threads) {
        cpu::lora_dropout({.x = at<>(x), .out = at<>(out), .dtype = DType(dtype), .rows = sizes[0],
                           .width = sizes[1], .x_stride = sizes[2], .out_stride = sizes[3],
                           .seed = *at<uint64_t>(seed), .threshold = threshold},
                          threads);
      },
      Release());
  m.def(
      "lora_shrink",
      [](Address x, Address h, int dtype, std::array<int64_t, 3> sizes, const std::vector<LowRankArguments>& downs,
         const std::vector<std::array<int64_t, 3>>& spans, int threads) {
        cpu::lora_shrink(lora_linear(x, h, dtype, sizes, downs, spans), threads);
      },
      Release());
  m.def(
      "lora_expand",
      [](Address y, Address h, int dtype, std::array<int64_t, 3> sizes, const std::vector<LowRankArguments>& ups,
         const std::vector<std::array<int64_t, 3>>& spans, int threads) {
        cpu::lora_expand(lora_linear(y, h, dtype, sizes, ups, spans), threads);
      },
      Release());

  // addresses = query, keys, values, starts, out; sizes = rows, heads, key heads, columns, D, D of the values, window;
  // strides = those of the query, the keys and the values
  m.def(
      "slot_attention",
      [](std::array<Address, 5> addresses, int dtype, std::array<int64_t, 7> sizes, std::array<int64_t, 8> strides,
         double scale, double softcap, int threads) {
        cpu::slot_attention({.query = at<>(addresses[0]), .keys = at<>(addresses[1]), .values = at<>(addresses[2]),
                             .out = at<>(addresses[4]), .dtype = DType(dtype), .rows = sizes[0], .heads = sizes[1],
                             .key_heads = sizes[2], .columns = sizes[3], .width = sizes[4], .value_width = sizes[5],
                             .query_strides = {strides[0], strides[1]},
                             .key_strides = {strides[2], strides[3], strides[4]},
                             .value_strides = {strides[5], strides[6], strides[7]},
                             .starts = at<int64_t>(addresses[3]), .window = sizes[6], .scale = scale, .softcap = softcap},
                            threads);
      },
      Release());
  m.def("few_rows_is_fast", &cpu::few_rows_is_fast);
  py::class_<cpu::FewRows>(m, "FewRows")
      .def(py::init(&few_rows))
      .def(
          "__call__",
          [](const cpu::FewRows& op, Address x, Address weight, Address bias, Address y, int threads) {
            cpu::few_rows(op, {.x = at<>(x), .weight = at<>(weight), .bias = at<>(bias), .y = at<>(y)}, threads);
          },
          Release());

  // See csrc/cpu/program.h. waits: whether the next stage needs what other threads make in this one.
  py::class_<cpu::Program>(m, "Program")
      .def(py::init([](int dtype, int64_t rows) {
        return cpu::Program{.dtype = DType(dtype), .rows = rows, .stages = {}};
      }))
      .def("product",
           [](cpu::Program& program, const cpu::FewRows& op, const std::array<Address, 4>& addresses, bool waits) {
             program.stages.push_back({cpu::Product{op, {.x = at<>(addresses[0]), .weight = at<>(addresses[1]),
                                                         .bias = at<>(addresses[2]), .y = at<>(addresses[3])}},
                                       waits});
           })
      // addresses = x, added or 0, weight, out; sizes = rows, width, strides of the rows of x and out
      .def("norm",
           [](cpu::Program& program, const std::array<Address, 4>& addresses, const std::array<int64_t, 4>& sizes,
              double eps, double offset, bool rounds, bool waits) {
             program.stages.push_back({cpu::Norm{.x = at<>(addresses[0]), .added = at<>(addresses[1]),
                                                 .weight = at<>(addresses[2]), .out = at<>(addresses[3]),
                                                 .rows = sizes[0], .width = sizes[1], .x_stride = sizes[2],
                                                 .out_stride = sizes[3], .eps = eps, .offset = offset,
                                                 .rounds = rounds},
                                       waits});
           })
      // addresses = query, key, value, keys and values of the cache, out; row_strides = of the first three; sizes =
      // heads, key heads, D, D of the values, window or 0, rotated; strides = of the cache's keys and values
      .def("attend",
           [](cpu::Program& program, const std::array<Address, 6>& addresses, const std::array<int64_t, 3>& row_strides,
              const std::array<int64_t, 6>& sizes, const std::array<int64_t, 6>& strides, double scale,
              double softcap) {
             const cpu::SlotAttention op{
                 .query = at<>(addresses[0]), .keys = at<>(addresses[3]), .values = at<>(addresses[4]),
                 .out = at<>(addresses[5]), .dtype = program.dtype, .rows = program.rows, .heads = sizes[0],
                 .key_heads = sizes[1], .columns = 0, .width = sizes[2], .value_width = sizes[3],
                 .query_strides = {row_strides[0], sizes[2]}, .key_strides = {strides[0], strides[1], strides[2]},
                 .value_strides = {strides[3], strides[4], strides[5]}, .starts = nullptr, .window = sizes[4],
                 .scale = scale, .softcap = softcap};
             program.stages.push_back({cpu::Attend{.query = at<>(addresses[0]), .key = at<>(addresses[1]),
                                                   .value = at<>(addresses[2]),
                                                   .row_strides = {row_strides[0], row_strides[1], row_strides[2]},
                                                   .op = op, .rotated = sizes[5]},
                                       true});
           })
      .def("gate",
           [](cpu::Program& program, Address gate, Address up, int64_t width, bool gelu) {
             program.stages.push_back({cpu::Gate{.gate = at<>(gate), .up = at<>(up), .rows = program.rows,
                                                 .width = width, .gelu = gelu},
                                       true});
           })
      .def(
          "__call__",
          [](const cpu::Program& program, Address cos, Address sin, Address places, int64_t column, int threads) {
            cpu::run(program, {.cos = at<>(cos), .sin = at<>(sin), .places = at<int64_t>(places), .column = column},
                     threads);
          },
          Release());

  // sizes = rows, vocabulary, row_stride; outputs = ids, logprobs, full_logprobs
  m.def(
      "sample_tokens",
      [](Address logits, int dtype, std::array<int64_t, 3> sizes, const TransformArguments& t, Address row_ids,
         Address seed, Address step, int64_t top_k, double top_p, double min_p, std::array<Address, 3> outputs,
         int threads) {
        cpu::sample_tokens({.logits = at<>(logits), .dtype = DType(dtype), .rows = sizes[0], .vocabulary = sizes[1],
                            .row_stride = sizes[2], .transform = transform(t), .row_ids = at<int64_t>(row_ids),
                            .seed = at<int64_t>(seed), .step = at<int64_t>(step), .top_k = top_k, .top_p = top_p,
                            .min_p = min_p, .ids = at<int64_t>(outputs[0]), .logprobs = at<>(outputs[1]),
                            .full_logprobs = at<>(outputs[2])},
                           threads);
      },
      Release());
}
