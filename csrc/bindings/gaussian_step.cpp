// gaussian_step.
#include "addresses.h"

namespace lacfast {
namespace {

void gaussian_step(std::int64_t rows, std::int64_t elements, Address sample, int sample_dtype, Address model_output,
                   int output_dtype, Address uncond_output, Address guidance_scale, Address coefficients,
                   std::int64_t table_steps, Address steps, bool is_shared, Address noise, int noise_dtype,
                   Address seed, Address sample_ids, double scale, Address prev_sample, Address log_prob,
                   Address guided_output, Address latents, int latents_dtype, Address model_outputs,
                   int model_outputs_dtype, Address log_probs, int threads) {
  const GaussianStep op{{rows, elements},
                        operand(sample, sample_dtype),
                        operand(model_output, output_dtype),
                        operand(uncond_output, output_dtype),
                        pointer<const float>(guidance_scale),
                        transition(coefficients, table_steps, steps, is_shared),
                        noise_source(noise, noise_dtype, seed, sample_ids),
                        scale,
                        result(prev_sample, sample_dtype),
                        pointer(log_prob),
                        result(guided_output, output_dtype),
                        {result(latents, latents_dtype), result(model_outputs, model_outputs_dtype),
                         pointer(log_probs)}};
  cpu::gaussian_step(op, threads);
}

}  // namespace

void bind_gaussian_step(py::module_& module) {
  module.def("gaussian_step", &gaussian_step, ReleaseGil());
}

}  // namespace lacfast
