// SPDX-License-Identifier: Apache-2.0
// The NSA half of the CPU backend: cuts an operation into work items and fills what no item owns.
#pragma once

#include <cstddef>
#include <string>

#include "backend/cpu/simd/nsa_table.h"
#include "core/nsa_problem.h"

namespace fsa::cpu {

std::string nsa_kernel_name(const NsaProblem& problem, const char* target);
std::size_t nsa_workspace_bytes(const NsaProblem& problem);
// -1 in the rows of selected_blocks that no sequence has.
void fill_unused_blocks(const NsaProblem& problem, const NsaArguments& args);
void run_nsa(const NsaKernelTable& kernels, const NsaProblem& problem, const NsaArguments& args,
             Workspace workspace);

}  // namespace fsa::cpu
