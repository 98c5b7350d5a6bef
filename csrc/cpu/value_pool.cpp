// value_pool: runs of tokens shared among threads, then added in their order.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "runs.h"

namespace lacfast::cpu {
namespace {

// Depends on nothing but the tokens' number, so a sample's result depends on nothing but the sample.
constexpr std::int64_t kTokensPerRun = 512;

std::size_t number_size(const ValuePool& op) {
  return op.features.dtype == DType::float64 ? sizeof(double) : sizeof(float);
}

// Uninitialised numbers of the arithmetic type. They begin with a cache line: a vector that lies in two is read twice.
class Numbers {
 public:
  Numbers(const ValuePool& op, std::int64_t count)
      : size_(number_size(op)), bytes_(new std::byte[static_cast<std::size_t>(count) * size_ + kLine]) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.get());
    first_ = bytes_.get() + (kLine - address % kLine) % kLine;
  }

  void* at(std::int64_t index) { return first_ + static_cast<std::size_t>(index) * size_; }

 private:
  static constexpr std::size_t kLine = 64;
  std::size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
  std::byte* first_;
};

std::int64_t rows_of(const ValuePool& op) { return op.features.sizes[0]; }

std::int64_t runs_of_tokens(const ValuePool& op) { return (tokens_of(op) + kTokensPerRun - 1) / kTokensPerRun; }

// body(run, index, scratch) for every run of every sample.
template <typename Body>
void for_each_token_run(const ValuePool& op, Threads threads, const Body& body) {
  const std::int64_t per_row = runs_of_tokens(op);
  const bool worth_threads = op.features.numel >= kElementsWorthThreads;
  share_tasks(rows_of(op) * per_row, worth_threads ? threads.count : 1, [&](const auto& next_task) {
    Numbers scratch(op, pool_scratch_numbers(op));
    for (std::int64_t index; next_task(index);) {
      const std::int64_t begin = index % per_row * kTokensPerRun;
      const std::int64_t end = begin + kTokensPerRun < tokens_of(op) ? begin + kTokensPerRun : tokens_of(op);
      body(Run{index / per_row, begin, end}, index, scratch.at(0));
    }
  });
}

void value_pool(const ValuePool& op, const ValuePoolOutputs& outputs, const Threads& threads) {
  const Kernels& chosen = kernels();
  const std::int64_t per_row = runs_of_tokens(op);
  const std::int64_t size = pool_partial_numbers(op);
  Numbers partials(op, rows_of(op) * per_row * size);
  for_each_token_run(op, threads, [&](Run run, std::int64_t index, void* scratch) {
    chosen.value_pool(op, run, scratch, partials.at(index * size), outputs.token_stats.data);
  });
  for (std::int64_t row = 0; row < rows_of(op); ++row)
    chosen.value_pool_finish(op, row, per_row, partials.at(row * per_row * size), outputs);
}

// A null gradient is not computed; without that of the features nothing of their size is written.
void value_pool_backward(const ValuePool& op, const ValuePoolOutputs& saved, const ValuePoolOutputs& grads,
                         const ValuePool& gradients, const Threads& threads) {
  const Kernels& chosen = kernels();
  const std::int64_t per_row = runs_of_tokens(op);
  const std::int64_t size = heads_of(op) * padded_dim(op);
  const bool has_sums = gradients.query.data != nullptr || gradients.norm_weight.data != nullptr;
  Numbers partials(op, has_sums ? rows_of(op) * per_row * size : 0);
  for_each_token_run(op, threads, [&](Run run, std::int64_t index, void* scratch) {
    void* partial = has_sums ? partials.at(index * size) : nullptr;
    chosen.value_pool_backward(op, run, saved, grads.pooled, scratch, partial, gradients.features);
  });
  if (!has_sums) return;
  for (std::int64_t row = 0; row < rows_of(op); ++row)
    chosen.value_pool_backward_finish(op, row, per_row, partials.at(row * per_row * size), gradients.query);
  if (gradients.norm_weight.data == nullptr) return;
  chosen.value_pool_norm_weight(op, saved, grads.pooled, partials.at(0), per_row * size, gradients.norm_weight);
}

const Registered<&value_pool> registered("cpu.value_pool");
const Registered<&value_pool_backward> registered_backward("cpu.value_pool_backward");

}  // namespace
}  // namespace lacfast::cpu
