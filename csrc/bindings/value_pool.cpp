// value_pool on the CPU.
#include "addresses.h"

namespace lacfast {
namespace {

ValuePool value_pool(std::int64_t rows, std::int64_t tokens, std::int64_t heads, std::int64_t dim, Address features,
                     int features_dtype, Address query, int query_dtype, Address norm_weight, int norm_weight_dtype,
                     double eps) {
  return {rows,
          tokens,
          heads,
          dim,
          operand(features, features_dtype),
          operand(query, query_dtype),
          operand(norm_weight, norm_weight_dtype),
          eps};
}

void value_pool_forward(std::int64_t rows, std::int64_t tokens, std::int64_t heads, std::int64_t dim, Address features,
                        int features_dtype, Address query, int query_dtype, Address norm_weight, int norm_weight_dtype,
                        double eps, Address out, Address pooled, Address log_sum_exp, Address token_stats,
                        int threads) {
  cpu::value_pool(value_pool(rows, tokens, heads, dim, features, features_dtype, query, query_dtype, norm_weight,
                             norm_weight_dtype, eps),
                  result(out, query_dtype), {pointer(pooled), pointer(log_sum_exp), pointer(token_stats)}, threads);
}

void value_pool_backward(std::int64_t rows, std::int64_t tokens, std::int64_t heads, std::int64_t dim,
                         Address features, int features_dtype, Address query, int query_dtype, Address norm_weight,
                         int norm_weight_dtype, double eps, Address pooled, Address log_sum_exp, Address token_stats,
                         Address grad, Address grad_features, Address grad_query, Address grad_norm_weight,
                         int threads) {
  cpu::value_pool_backward(value_pool(rows, tokens, heads, dim, features, features_dtype, query, query_dtype,
                                      norm_weight, norm_weight_dtype, eps),
                           {pointer(pooled), pointer(log_sum_exp), pointer(token_stats)}, operand(grad, query_dtype),
                           result(grad_features, features_dtype), result(grad_query, query_dtype),
                           result(grad_norm_weight, norm_weight_dtype), threads);
}

}  // namespace

void bind_value_pool(py::module_& module) {
  module.def("value_pool_forward", &value_pool_forward, ReleaseGil());
  module.def("value_pool_backward", &value_pool_backward, ReleaseGil());
}

}  // namespace lacfast
