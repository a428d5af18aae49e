// SPDX-License-Identifier: Apache-2.0
#include "api/prepare.h"
#include "core/log.h"

namespace fsa {
namespace {

// "forward float32 batch 2 heads 8/2 seqlen 128x256 head_dim 64/64 -> cpu, ...; cuda: ..."
void log_choice(const Problem& problem, const Backend& chosen) {
  const char* operation = problem.operation == Operation::forward    ? "forward"
                          : problem.operation == Operation::backward ? "backward"
                                                                     : "decode";
  std::string line = text_of(operation, " ", name_of(problem.dtype), " batch ", problem.batch, " heads ",
                             problem.num_heads, "/", problem.num_kv_heads, " seqlen ", problem.max_seqlen_q,
                             "x", problem.max_seqlen_k, " head_dim ", problem.head_dim, "/",
                             problem.head_dim_v, " -> ", chosen.name(), ", ", chosen.kernel(problem));
  for (const Backend* backend : registry()) {
    if (backend == &chosen) break;
    const std::string reason = backend->reject(problem);
    line += text_of("; ", backend->name(), ": ", reason.empty() ? "another backend was asked for" : reason);
  }
  write_log(line);
}

}  // namespace

void run(Call& call, const std::string& wanted_backend, Workspace workspace, void* stream) {
  const Backend& backend = choose_backend(call.problem, wanted_backend);
  const std::size_t needed = backend.workspace_bytes(call.problem);
  check_workspace(workspace, needed);
  check_no_overlap(call.inputs, call.outputs, workspace, needed);
  if (logs_dispatch()) log_choice(call.problem, backend);
  call.arguments.stream = stream;
  backend.run(call.problem, call.arguments, workspace);
}

}  // namespace fsa
