// SPDX-License-Identifier: Apache-2.0
// The compressed branch's forward with its selection, of one instruction set: a whole forward, compiled beside the other
// kernels of native sparse attention.
#pragma once

#include "backend/cpu/simd/nsa_table.h"

#define FSA_JOIN_(a, b) a##b
#define FSA_JOIN(a, b) FSA_JOIN_(a, b)

namespace fsa::cpu {

std::size_t FSA_JOIN(FSA_SIMD_TARGET, _select_forward_scratch)(const Problem& attention, const NsaProblem& p,
                                                               std::int64_t units);
void FSA_JOIN(FSA_SIMD_TARGET, _select_forward)(const Problem& attention, const Arguments& args,
                                                const NsaProblem& p, const NsaArguments& nsa_args,
                                                const ForwardItem& item, void* scratch);

}  // namespace fsa::cpu
