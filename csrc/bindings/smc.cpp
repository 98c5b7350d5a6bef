// Particles on the CPU and, where it was compiled, on CUDA.
#include "addresses.h"

namespace lacfast {
namespace {

Particles particles(std::int64_t groups, std::int64_t count, int code, Address log_weights) {
  return {groups, count, dtype(code), pointer<const void>(log_weights)};
}

Resampling resampling(Address steps, Address seed, Address group_ids, Address ancestors) {
  return {pointer<const std::int64_t>(steps), pointer<const std::int64_t>(seed),
          pointer<const std::int64_t>(group_ids), pointer<std::int64_t>(ancestors)};
}

void effective_sample_size(std::int64_t groups, std::int64_t count, int code, Address log_weights, Address sizes) {
  cpu::effective_sample_size(particles(groups, count, code, log_weights), pointer(sizes));
}

void systematic_resample(std::int64_t groups, std::int64_t count, int code, Address log_weights, Address steps,
                         Address seed, Address group_ids, Address ancestors) {
  cpu::systematic_resample(particles(groups, count, code, log_weights),
                           resampling(steps, seed, group_ids, ancestors));
}

#if defined(LACFAST_WITH_CUDA)
void cuda_effective_sample_size(std::int64_t groups, std::int64_t count, int code, Address log_weights, Address sizes,
                                Address stream) {
  cuda::effective_sample_size(particles(groups, count, code, log_weights), pointer(sizes), pointer(stream));
}

void cuda_systematic_resample(std::int64_t groups, std::int64_t count, int code, Address log_weights, Address steps,
                              Address seed, Address group_ids, Address ancestors, Address stream) {
  cuda::systematic_resample(particles(groups, count, code, log_weights),
                            resampling(steps, seed, group_ids, ancestors), pointer(stream));
}
#endif

}  // namespace

void bind_smc(py::module_& module) {
  module.def("effective_sample_size", &effective_sample_size, ReleaseGil());
  module.def("systematic_resample", &systematic_resample, ReleaseGil());
#if defined(LACFAST_WITH_CUDA)
  module.def("cuda_effective_sample_size", &cuda_effective_sample_size, ReleaseGil());
  module.def("cuda_systematic_resample", &cuda_systematic_resample, ReleaseGil());
#endif
}

}  // namespace lacfast
