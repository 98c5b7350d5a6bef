// Python bindings. Tensors come as addresses and dtype codes, a CUDA stream as its address; lacfast/ops checks them.
// The interpreter lock is released around every kernel.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/philox.h"
#include "ops.h"

namespace py = pybind11;

namespace lacfast {
namespace {

using Address = std::uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: addresses of tensors that the caller keeps alive
}

DType dtype(int code) { return static_cast<DType>(code); }
Operand operand(Address address, int code) { return {pointer<const void>(address), dtype(code)}; }
Result result(Address address, int code) { return {pointer(address), dtype(code)}; }

Transition transition(Address coefficients, std::int64_t table_steps, Address steps) {
  return {pointer<const void>(coefficients), table_steps, pointer<const std::int64_t>(steps)};
}

Noise noise_source(Address noise, int noise_dtype, Address seed, Address sample_ids) {
  return {operand(noise, noise_dtype), pointer<const std::int64_t>(seed), pointer<const std::int64_t>(sample_ids)};
}

// The generator by itself, for its published answers.
py::tuple philox_words(const std::array<std::uint32_t, 4>& counter, const std::array<std::uint32_t, 2>& key) {
  const PhiloxWords words = philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
  return py::make_tuple(words.w0, words.w1, words.w2, words.w3);
}

void normal_noise(std::int64_t rows, std::int64_t elements, Address steps, Address seed, Address sample_ids,
                  Address out, int threads) {
  cpu::normal_noise({rows, elements}, pointer<const std::int64_t>(steps), pointer<const std::int64_t>(seed),
                    pointer<const std::int64_t>(sample_ids), pointer<float>(out), threads);
}

void gaussian_step(std::int64_t rows, std::int64_t elements, Address sample, int sample_dtype, Address model_output,
                   int output_dtype, Address uncond_output, Address guidance_scale, Address coefficients,
                   std::int64_t table_steps, Address steps, Address noise, int noise_dtype, Address seed,
                   Address sample_ids, double scale, Address prev_sample, Address log_prob, Address guided_output,
                   int threads) {
  const GaussianStep op{{rows, elements},
                        operand(sample, sample_dtype),
                        operand(model_output, output_dtype),
                        operand(uncond_output, output_dtype),
                        pointer<const float>(guidance_scale),
                        transition(coefficients, table_steps, steps),
                        noise_source(noise, noise_dtype, seed, sample_ids),
                        scale,
                        result(prev_sample, sample_dtype),
                        pointer(log_prob),
                        result(guided_output, output_dtype)};
  cpu::gaussian_step(op, threads);
}

LogRatio log_ratio(std::int64_t rows, std::int64_t elements, Address model_output, Address old_model_output,
                   Address reference_output, int output_dtype, Address coefficients, std::int64_t table_steps,
                   Address steps, Address noise, int noise_dtype, Address seed, Address sample_ids, double scale) {
  return {{rows, elements},
          operand(model_output, output_dtype),
          operand(old_model_output, output_dtype),
          operand(reference_output, output_dtype),
          transition(coefficients, table_steps, steps),
          noise_source(noise, noise_dtype, seed, sample_ids),
          scale};
}

void log_ratio_forward(std::int64_t rows, std::int64_t elements, Address model_output, Address old_model_output,
                       Address reference_output, int output_dtype, Address coefficients, std::int64_t table_steps,
                       Address steps, Address noise, int noise_dtype, Address seed, Address sample_ids, double scale,
                       Address terms, int threads) {
  cpu::log_ratio_forward(log_ratio(rows, elements, model_output, old_model_output, reference_output, output_dtype,
                                   coefficients, table_steps, steps, noise, noise_dtype, seed, sample_ids, scale),
                         pointer(terms), threads);
}

void ppo_loss_forward(std::int64_t rows, std::int64_t elements, Address model_output, Address old_model_output,
                      Address reference_output, int output_dtype, Address coefficients, std::int64_t table_steps,
                      Address steps, Address noise, int noise_dtype, Address seed, Address sample_ids, double scale,
                      Address advantages, Address weights, double clip_range, double kl_weight, Address table,
                      int threads) {
  const Surrogate surrogate{pointer<const void>(advantages), pointer<const void>(weights), clip_range, kl_weight};
  cpu::ppo_loss_forward(log_ratio(rows, elements, model_output, old_model_output, reference_output, output_dtype,
                                  coefficients, table_steps, steps, noise, noise_dtype, seed, sample_ids, scale),
                        surrogate, pointer(table), threads);
}

void log_ratio_backward(std::int64_t rows, std::int64_t elements, Address model_output, Address old_model_output,
                        Address reference_output, int output_dtype, Address coefficients, std::int64_t table_steps,
                        Address steps, Address noise, int noise_dtype, Address seed, Address sample_ids, double scale,
                        Address grad_terms, Address grad_model_output, int threads) {
  cpu::log_ratio_backward(log_ratio(rows, elements, model_output, old_model_output, reference_output, output_dtype,
                                    coefficients, table_steps, steps, noise, noise_dtype, seed, sample_ids, scale),
                          pointer<const void>(grad_terms), result(grad_model_output, output_dtype), threads);
}

Gae gae(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma, double gae_lambda,
        double value_lambda) {
  return {rows, steps, heads, dtype(code), gamma, gae_lambda, value_lambda};
}

void gae_forward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma, double gae_lambda,
                 double value_lambda, Address rewards, Address values, Address advantages, Address returns) {
  cpu::gae(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda), pointer<const void>(rewards),
           pointer<const void>(values), pointer(advantages), pointer(returns));
}

void gae_backward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma, double gae_lambda,
                  double value_lambda, Address grad_advantages, Address grad_returns, Address grad_rewards,
                  Address grad_values) {
  cpu::gae_backward(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda),
                    pointer<const void>(grad_advantages), pointer<const void>(grad_returns), pointer(grad_rewards),
                    pointer(grad_values));
}

#if defined(LACFAST_WITH_CUDA)
void cuda_gae_forward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma,
                      double gae_lambda, double value_lambda, Address rewards, Address values, Address advantages,
                      Address returns, Address stream) {
  cuda::gae(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda), pointer<const void>(rewards),
            pointer<const void>(values), pointer(advantages), pointer(returns), pointer(stream));
}

void cuda_gae_backward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma,
                       double gae_lambda, double value_lambda, Address grad_advantages, Address grad_returns,
                       Address grad_rewards, Address grad_values, Address stream) {
  cuda::gae_backward(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda),
                     pointer<const void>(grad_advantages), pointer<const void>(grad_returns), pointer(grad_rewards),
                     pointer(grad_values), pointer(stream));
}

std::string cuda_unusable_reason() { return cuda::unusable_reason(); }
#else
std::string cuda_unusable_reason() { return "built without CUDA (LACFAST_CUDA=OFF, or no CUDA compiler was found)"; }
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU and CUDA kernels of lacfast; called through lacfast.ops.";
  module.def("instruction_set", &cpu::instruction_set);
  module.def("cuda_unusable_reason", &cuda_unusable_reason);
  module.def("philox4x32_10", &philox_words);
  module.def("normal_noise", &normal_noise, ReleaseGil());
  module.def("gaussian_step", &gaussian_step, ReleaseGil());
  module.def("log_ratio_forward", &log_ratio_forward, ReleaseGil());
  module.def("ppo_loss_forward", &ppo_loss_forward, ReleaseGil());
  module.def("log_ratio_backward", &log_ratio_backward, ReleaseGil());
  module.def("gae", &gae_forward, ReleaseGil());
  module.def("gae_backward", &gae_backward, ReleaseGil());
#if defined(LACFAST_WITH_CUDA)
  module.def("cuda_gae", &cuda_gae_forward, ReleaseGil());
  module.def("cuda_gae_backward", &cuda_gae_backward, ReleaseGil());
#endif
}

}  // namespace lacfast
