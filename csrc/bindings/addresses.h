// Tensors come from Python as addresses and dtype codes, a CUDA stream as its address; lacfast/ops checks them.
#pragma once

#include <pybind11/pybind11.h>

#include "../ops.h"

namespace lacfast {

namespace py = pybind11;

using Address = std::uintptr_t;
// Every kernel runs without the interpreter lock.
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: addresses of tensors that the caller keeps alive
}

inline DType dtype(int code) { return static_cast<DType>(code); }
inline Operand operand(Address address, int code) { return {pointer<const void>(address), dtype(code)}; }
inline Result result(Address address, int code) { return {pointer(address), dtype(code)}; }

inline Transition transition(Address coefficients, std::int64_t table_steps, Address steps, bool is_shared = false) {
  return {pointer<const void>(coefficients), table_steps, pointer<const std::int64_t>(steps), is_shared};
}

inline Noise noise_source(Address noise, int noise_dtype, Address seed, Address sample_ids) {
  return {operand(noise, noise_dtype), pointer<const std::int64_t>(seed), pointer<const std::int64_t>(sample_ids)};
}

// One function per op, each in the file of its name.
void bind_noise(py::module_& module);
void bind_gaussian_step(py::module_& module);
void bind_step_log_prob(py::module_& module);
void bind_ppo_loss(py::module_& module);
void bind_gae(py::module_& module);
void bind_advantages(py::module_& module);
void bind_smc(py::module_& module);
void bind_value_pool(py::module_& module);

}  // namespace lacfast
