// The counter-based generator: by itself, for its published answers, and as normals.
#include <pybind11/stl.h>

#include <array>

#include "../common/philox.h"
#include "addresses.h"

namespace lacfast {
namespace {

py::tuple philox_words(const std::array<std::uint32_t, 4>& counter, const std::array<std::uint32_t, 2>& key) {
  const PhiloxWords words = philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
  return py::make_tuple(words.w0, words.w1, words.w2, words.w3);
}

void normal_noise(std::int64_t rows, std::int64_t elements, Address steps, Address seed, Address sample_ids,
                  Address out, int threads) {
  cpu::normal_noise({rows, elements}, pointer<const std::int64_t>(steps), pointer<const std::int64_t>(seed),
                    pointer<const std::int64_t>(sample_ids), pointer<float>(out), threads);
}

}  // namespace

void bind_noise(py::module_& module) {
  module.def("philox4x32_10", &philox_words);
  module.def("normal_noise", &normal_noise, ReleaseGil());
}

}  // namespace lacfast
