// What the parts of this build say of themselves.
#pragma once

#include <string>

namespace lacfast {

namespace cpu {
// The instruction set in use: "x86-64-v2", "x86-64-v3" or "portable".
const char* instruction_set();
}  // namespace cpu

namespace cuda {
// Empty when a kernel of ours can run on the current machine, else the reason why not.
std::string unusable_reason();
}  // namespace cuda

}  // namespace lacfast
