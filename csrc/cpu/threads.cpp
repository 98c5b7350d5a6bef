// The threads that share a kernel's work: those of OpenMP, which torch's own operations have too. The loader takes the library
// that torch brought, so one set of threads waits for the work of both; another would wait for the same cores.

#include <omp.h>
#include <pthread.h>

#include "runs.h"

namespace lacfast::cpu {
namespace {

// GNU's library does not notice a fork: a child would wait for helpers that it does not have. Without helpers before the fork,
// parent and child start their own after it.
void release_helpers() { omp_pause_resource_all(omp_pause_hard); }

[[maybe_unused]] const int registered = pthread_atfork(&release_helpers, nullptr, nullptr);

}  // namespace

void on_threads(std::int64_t count, const std::function<void()>& work) {
  if (count <= 1) return work();
#pragma omp parallel num_threads(static_cast<int>(count))
  work();
}

}  // namespace lacfast::cpu
