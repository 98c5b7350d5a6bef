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
                      Address kl_gains, bool is_normalized, Address advantages, Address weights, Address step_weights,
                      Address mask, double clip_low, double clip_high, double dual_clip, double kl_threshold,
                      double kl_weight, Address loss, Address table, Address step_sums, Address shares, int threads) {
  const LogRatio ratio = log_ratio(rows, elements, model_output, old_model_output, reference_output, output_dtype,
                                   coefficients, table_steps, steps, noise, noise_dtype, seed, sample_ids, scale);
  const Surrogate surrogate{pointer<const void>(advantages),
                            pointer<const void>(weights),
                            pointer<const void>(step_weights),
                            pointer<const bool>(mask),
                            {clip_low, clip_high, dual_clip, kl_threshold},
                            kl_weight};
  cpu::ppo_loss_forward({ratio, pointer<const void>(kl_gains), is_normalized}, surrogate,
                        {pointer(loss), pointer(table), pointer(step_sums), pointer(shares)}, threads);
}

void ppo_loss_backward(std::int64_t rows, std::int64_t elements, Address model_output, Address old_model_output,
                       Address reference_output, int output_dtype, Address coefficients, std::int64_t table_steps,
                       Address steps, Address noise, int noise_dtype, Address seed, Address sample_ids, double scale,
                       Address kl_gains, bool is_normalized, Address shares, Address grad_loss,
                       Address grad_model_output, int threads) {
  const LogRatio ratio = log_ratio(rows, elements, model_output, old_model_output, reference_output, output_dtype,
                                   coefficients, table_steps, steps, noise, noise_dtype, seed, sample_ids, scale);
  cpu::ppo_loss_backward({ratio, pointer<const void>(kl_gains), is_normalized}, pointer<const void>(shares),
                         pointer<const void>(grad_loss), result(grad_model_output, output_dtype), threads);
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
  module.def("ppo_loss_backward", &ppo_loss_backward, ReleaseGil());
  module.def("log_ratio_backward", &log_ratio_backward, ReleaseGil());
}

}  // namespace lacfast
