// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/reference_nsa.h"

namespace fsa::reference {

Matrix load_rows(const Operand& tensor, std::int64_t batch, std::int64_t begin, std::int64_t rows,
                 std::int64_t head, std::int64_t dims) {
  Matrix result(rows, dims);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t d = 0; d < dims; ++d) result[row][d] = load(tensor, batch, begin + row, head, d);
  return result;
}

void store_rows(const Operand& tensor, const Matrix& values, std::int64_t batch, std::int64_t begin,
                std::int64_t head) {
  for (std::int64_t row = 0; row < values.rows; ++row)
    for (std::int64_t d = 0; d < values.columns; ++d)
      store(tensor, values[row][d], batch, begin + row, head, d);
}

void fill_rows(const NsaProblem& problem, const Operand& tensor, double value, std::int64_t dims) {
  fill(tensor, value, problem.packed ? 1 : problem.batch,
       problem.packed ? problem.total_q : problem.max_seqlen_q, problem.num_heads, dims);
}

void fill_keys(const NsaProblem& problem, const Operand& tensor, double value, std::int64_t dims) {
  fill(tensor, value, problem.packed ? 1 : problem.batch,
       problem.packed ? problem.total_k : problem.max_seqlen_k, problem.num_kv_heads, dims);
}

}  // namespace fsa::reference
