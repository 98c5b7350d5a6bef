// value_pool: runs of tokens shared among threads, then added in their order.

#include <cstddef>
#include <memory>

#include "runs.h"

namespace lacfast::cpu {
namespace {

// Depends on nothing but the tokens' number, so a sample's result depends on nothing but the sample.
constexpr std::int64_t kTokensPerRun = 512;

std::size_t number_size(const ValuePool& op) {
  return op.features.dtype == DType::float64 ? sizeof(double) : sizeof(float);
}

// Uninitialised numbers of the arithmetic type.
class Numbers {
 public:
  Numbers(const ValuePool& op, std::int64_t count)
      : size_(number_size(op)), bytes_(new std::byte[static_cast<std::size_t>(count) * size_]) {}

  void* at(std::int64_t index) { return bytes_.get() + static_cast<std::size_t>(index) * size_; }

 private:
  std::size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
};

std::int64_t runs_of_tokens(const ValuePool& op) { return (op.tokens + kTokensPerRun - 1) / kTokensPerRun; }

// body(run, index, scratch) for every run of every sample.
template <typename Body>
void for_each_token_run(const ValuePool& op, int threads, const Body& body) {
  const std::int64_t per_row = runs_of_tokens(op);
  const bool worth_threads = op.rows * op.tokens * op.dim >= kElementsWorthThreads;
  share_tasks(op.rows * per_row, worth_threads ? threads : 1, [&](const auto& next_task) {
    Numbers scratch(op, pool_scratch_numbers(op));
    for (std::int64_t index; next_task(index);) {
      const std::int64_t begin = index % per_row * kTokensPerRun;
      const std::int64_t end = begin + kTokensPerRun < op.tokens ? begin + kTokensPerRun : op.tokens;
      body(Run{index / per_row, begin, end}, index, scratch.at(0));
    }
  });
}

}  // namespace

void value_pool(const ValuePool& op, Result out, const PoolSaved& saved, int threads) {
  const Kernels& chosen = kernels();
  const std::int64_t per_row = runs_of_tokens(op);
  const std::int64_t size = pool_partial_numbers(op);
  Numbers partials(op, op.rows * per_row * size);
  for_each_token_run(op, threads, [&](Run run, std::int64_t index, void* scratch) {
    chosen.value_pool(op, run, scratch, partials.at(index * size), saved.token_stats);
  });
  for (std::int64_t row = 0; row < op.rows; ++row)
    chosen.value_pool_finish(op, row, per_row, partials.at(row * per_row * size), out, saved);
}

void value_pool_backward(const ValuePool& op, const PoolSaved& saved, Operand grad, Result grad_features,
                         Result grad_query, Result grad_norm_weight, int threads) {
  const Kernels& chosen = kernels();
  const std::int64_t per_row = runs_of_tokens(op);
  const std::int64_t size = op.heads * padded_dim(op);
  const bool has_sums = grad_query.data != nullptr || grad_norm_weight.data != nullptr;
  Numbers partials(op, has_sums ? op.rows * per_row * size : 0);
  for_each_token_run(op, threads, [&](Run run, std::int64_t index, void* scratch) {
    void* partial = has_sums ? partials.at(index * size) : nullptr;
    chosen.value_pool_backward(op, run, saved, grad, scratch, partial, grad_features);
  });
  if (!has_sums) return;
  for (std::int64_t row = 0; row < op.rows; ++row)
    chosen.value_pool_backward_finish(op, row, per_row, partials.at(row * per_row * size), grad_query);
  if (grad_norm_weight.data == nullptr) return;
  chosen.value_pool_norm_weight(op, saved, grad, partials.at(0), per_row * size, grad_norm_weight);
}

}  // namespace lacfast::cpu
