// The Python module: what this build can run, its kernels by name, and the generator for its published answers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <numeric>
#include <stdexcept>

#include "../build.h"
#include "../common/philox.h"
#include "words.h"

namespace lacfast {
namespace {

// A kernel as Python calls it: with one NamedTuple for each record.
py::cpp_function bound_kernel(const std::string& name, const std::vector<std::string>& formats) {
  const auto found = kernels_by_name().find(name);
  if (found == kernels_by_name().end()) throw std::invalid_argument("no kernel " + name + " in this build");
  const Kernel kernel = found->second;
  std::vector<std::size_t> sizes;
  for (const std::string& format : formats) sizes.push_back(words_in(format));
  if (sizes != kernel.words) throw std::invalid_argument(name + ": the records of lacfast/ops are not those of ops.h");
  return {[kernel, formats](const py::args& records) {
    if (records.size() != formats.size()) throw std::invalid_argument("one record for each format");
    // Kept from call to call: an allocation costs as much as a tensor's address.
    thread_local std::vector<std::int64_t> words;
    thread_local std::vector<const std::int64_t*> addresses;
    words.resize(std::accumulate(kernel.words.begin(), kernel.words.end(), std::size_t{0}));
    addresses.clear();
    std::int64_t* next = words.data();
    for (std::size_t i = 0; i < formats.size(); ++i) {
      put_record(next, formats[i], PyTuple_GET_ITEM(records.ptr(), static_cast<Py_ssize_t>(i)));
      addresses.push_back(next);
      next += kernel.words[i];
    }
    const py::gil_scoped_release without_interpreter;
    kernel.run(addresses.data());
  }};
}

py::bytes addresses(const std::string& format, const py::tuple& record) {
  std::vector<std::int64_t> words(words_in(format));
  put_record(words.data(), format, record.ptr());
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(std::int64_t)};
}

// The value of a float32 or float64 tensor of one, on the CPU: torch's own way leaves a mark in every profile.
double number(const py::object& tensor) {
  const Tensor value = tensor_of(tensor.ptr());
  return value.dtype == DType::float64 ? *value.as<const double>() : static_cast<double>(*value.as<const float>());
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& entry : kernels_by_name()) names.push_back(entry.first);
  return names;
}

py::tuple philox_words(const std::array<std::uint32_t, 4>& counter, const std::array<std::uint32_t, 2>& key) {
  const PhiloxWords words = philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
  return py::make_tuple(words.w0, words.w1, words.w2, words.w3);
}

#if defined(LACFAST_CUDA_MISSING)
std::string cuda_unusable_reason() { return "built without CUDA: " LACFAST_CUDA_MISSING; }
#else
std::string cuda_unusable_reason() { return cuda::unusable_reason(); }
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU and CUDA kernels of lacfast; called through lacfast.ops.";
  module.def("instruction_set", &cpu::instruction_set);
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("use_instruction_set", &cpu::use_instruction_set);
  module.def("cuda_unusable_reason", &cuda_unusable_reason);
  module.def("philox4x32_10", &philox_words);
  module.def("kernel_names", &kernel_names);
  module.def("name_dtypes", &name_dtypes);
  module.def("use_dlpack", &use_dlpack);
  module.def("addresses", &addresses);
  module.def("layout", &layout_of);
  module.def("number", &number);
  module.def("kernel", &bound_kernel);
}

}  // namespace lacfast
