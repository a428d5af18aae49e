// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, as kernels.cpp.
#include "backend/cpu/simd/nsa_forward_kernels.h"

#include "backend/cpu/simd/select_forward-inl.h"

namespace fsa::cpu {

std::size_t FSA_JOIN(FSA_SIMD_TARGET, _select_forward_scratch)(const Problem& attention, const NsaProblem& p,
                                                               std::int64_t units) {
  return FSA_SIMD_TARGET::select_forward_scratch(attention, p, units);
}
void FSA_JOIN(FSA_SIMD_TARGET, _select_forward)(const Problem& attention, const Arguments& args,
                                                const NsaProblem& p, const NsaArguments& nsa_args,
                                                const ForwardItem& item, void* scratch) {
  FSA_SIMD_TARGET::select_forward(attention, args, p, nsa_args, item, scratch);
}

}  // namespace fsa::cpu
