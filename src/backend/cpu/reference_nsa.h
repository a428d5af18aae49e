// SPDX-License-Identifier: Apache-2.0
// The float64 oracle of native sparse attention: as reference.h. Every output is written in full; what no row,
// window or sequence owns gets 0 (lse: -inf, selected_blocks: -1).
#pragma once

#include "backend/cpu/reference_tensors.h"
#include "core/nsa_problem.h"

namespace fsa::reference {

void compress(const NsaProblem& problem, const NsaArguments& args);
void compress_backward(const NsaProblem& problem, const NsaArguments& args);
void select_blocks(const NsaProblem& problem, const NsaArguments& args);
void selected_forward(const NsaProblem& problem, const NsaArguments& args);
void selected_backward(const NsaProblem& problem, const NsaArguments& args);
void combine(const NsaProblem& problem, const NsaArguments& args);
void combine_backward(const NsaProblem& problem, const NsaArguments& args);

// Rows [begin, begin + rows) of one head.
Matrix load_rows(const Operand& tensor, std::int64_t batch, std::int64_t begin, std::int64_t rows,
                 std::int64_t head, std::int64_t dims);
void store_rows(const Operand& tensor, const Matrix& values, std::int64_t batch, std::int64_t begin,
                std::int64_t head);

// fill() for tensors over the rows, and over the keys, of a problem: packed ones are one sequence to it.
void fill_rows(const NsaProblem& problem, const Operand& tensor, double value, std::int64_t dims);
void fill_keys(const NsaProblem& problem, const Operand& tensor, double value, std::int64_t dims);

}  // namespace fsa::reference
