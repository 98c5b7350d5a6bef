// What the parts of this build say of themselves.
#pragma once

#include <string>
#include <vector>

namespace lacfast {

namespace cpu {
// The instruction set in use, and those of this build that the processor has, from the oldest to the newest.
std::string instruction_set();
std::vector<std::string> instruction_sets();
// For the calls that begin after it, of every thread. Throws for one that is not among them.
void use_instruction_set(const std::string& name);
}  // namespace cpu

namespace cuda {
// Empty when a kernel of ours can run on the current machine, else the reason why not.
std::string unusable_reason();
}  // namespace cuda

}  // namespace lacfast
