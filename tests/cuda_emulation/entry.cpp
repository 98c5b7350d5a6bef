// The registered kernels under a C name; records as csrc/bindings gives them.
#include "../../csrc/registry.h"

extern "C" void call(const char* name, const std::int64_t* const* records) {
  lacfast::kernels_by_name().at(name).run(records);
}
