// log_ratio and ppo_loss.
#include "addresses.h"

namespace lacfast {
namespace {

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

}  // namespace

void bind_ppo_loss(py::module_& module) {
  module.def("log_ratio_forward", &log_ratio_forward, ReleaseGil());
  module.def("ppo_loss_forward", &ppo_loss_forward, ReleaseGil());
  module.def("log_ratio_backward", &log_ratio_backward, ReleaseGil());
}

}  // namespace lacfast
