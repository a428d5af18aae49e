// SPDX-License-Identifier: Apache-2.0
#include "api/choice.h"
#include "api/prepare.h"

namespace fsa {

std::string describe(const Problem& problem) {
  return text_of(name_of(problem.operation), " ", name_of(problem.dtype), " batch ", problem.batch, " heads ",
                 problem.num_heads, "/", problem.num_kv_heads, " seqlen ", problem.max_seqlen_q, "x",
                 problem.max_seqlen_k, " head_dim ", problem.head_dim, "/", problem.head_dim_v);
}

void run(Call& call, const std::string& wanted_backend, Workspace workspace, void* stream) {
  run_call(call, wanted_backend, workspace, stream);
}

}  // namespace fsa
