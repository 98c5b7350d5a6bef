// An op as runs of one latent: which kernels this processor takes, how threads share the runs, and single numbers in and
// out of tensors in the arithmetic type.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "../registry.h"
#include "kernels.h"

namespace lacfast::cpu {

// The kernels of this processor's instruction set.
const Kernels& kernels();

constexpr std::int64_t kRun = 16 * kBlock;
// Below this a second thread costs more than it saves.
constexpr std::int64_t kElementsWorthThreads = 1'000'000;

inline std::int64_t runs_per_row(Shape shape) { return (shape.elements + kRun - 1) / kRun; }

// work(), which throws nothing, once on each of `count` threads, of which the caller is one; returns when all have ended.
void on_threads(std::int64_t count, const std::function<void()>& work);

// work(next_task) on up to `threads` threads, which take tasks as they come: next_task(index) is false after the last.
// What the first of them throws, an allocation that fails, is thrown to the caller when all have ended.
template <typename Work>
void share_tasks(std::int64_t total, std::int64_t threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto next_task = [&](std::int64_t& index) {
    return (index = next.fetch_add(1, std::memory_order_relaxed)) < total;
  };
  std::mutex of_failure;
  std::exception_ptr failure;
  on_threads(threads < total ? threads : total, [&] {
    try {
      work(next_task);
    } catch (...) {
      // No further tasks for the others.
      next.store(total, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(of_failure);
      if (failure == nullptr) failure = std::current_exception();
    }
  });
  if (failure != nullptr) std::rethrow_exception(failure);
}

inline std::int64_t worthwhile_threads(Shape shape, Threads threads) {
  return shape.rows * shape.elements >= kElementsWorthThreads ? threads.count : 1;
}

// Run `index` of a row.
inline Run run_of(Shape shape, std::int64_t row, std::int64_t index) {
  const std::int64_t begin = index * kRun;
  return {row, begin, begin + kRun < shape.elements ? begin + kRun : shape.elements};
}

// body(run, index) for every run of every row; results are kept by index.
template <typename Body>
void for_each_run(Shape shape, Threads threads, const Body& body) {
  const std::int64_t per_row = runs_per_row(shape);
  share_tasks(shape.rows * per_row, worthwhile_threads(shape, threads), [&](const auto& next_task) {
    for (std::int64_t index; next_task(index);)
      body(run_of(shape, index / per_row, index % per_row), static_cast<std::size_t>(index));
  });
}

inline double scalar_at(const void* data, std::int64_t index, bool wide) {
  return wide ? static_cast<const double*>(data)[index] : static_cast<double>(static_cast<const float*>(data)[index]);
}

inline void put(void* data, std::int64_t index, double value, bool wide) {
  if (wide) {
    static_cast<double*>(data)[index] = value;
  } else {
    static_cast<float*>(data)[index] = static_cast<float>(value);
  }
}

// Throws for a step beyond the table.
void check_steps(const Transition& transition, std::int64_t rows);

struct RowCoefficients {
  double std, gain;
};

inline RowCoefficients coefficients_of(const Transition& transition, std::int64_t row, bool wide) {
  const std::int64_t at = 3 * step_of(transition, row);
  const double std = scalar_at(transition.coefficients.data, at + 2, wide);
  return {std, innovation_gain(scalar_at(transition.coefficients.data, at + 1, wide), std)};
}

// The log-prob of a row from sum (x' - mu)^2 of its runs, added in their order.
inline double log_prob_of_row(const std::vector<double>& partial, std::int64_t row, Shape shape, double std,
                              double scale) {
  const std::int64_t per_row = runs_per_row(shape);
  double squared_distance = 0.0;
  for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i)
    squared_distance += partial[static_cast<std::size_t>(i)];
  return log_prob_from_sum(squared_distance, std, static_cast<double>(shape.elements), scale);
}

}  // namespace lacfast::cpu
