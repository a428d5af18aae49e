// SPDX-License-Identifier: Apache-2.0
// The last steps of every operation, and what they say about the choice of a backend.
#pragma once

#include <string>
#include <vector>

#include "api/call.h"
#include "backend/backend.h"
#include "core/log.h"

namespace fsa {

// "forward float32 batch 2 heads 8/2 seqlen 128x256 head_dim 64/64", for the log.
std::string describe(const Problem& problem);
std::string describe(const NsaProblem& problem);

// Why a backend other than the chosen one was passed over. A forced instruction set that is missing stops a call that
// would use it; here it is one more reason.
template <class AnyProblem>
std::string reason_against(const Backend& backend, const AnyProblem& problem) {
  try {
    const std::string reason = backend.reject(problem);
    return reason.empty() ? "could compute this, but another backend was asked for" : reason;
  } catch (const Error& error) {
    return error.what();
  }
}

// The backends in their order, up to and beyond the chosen one.
template <class AnyProblem>
std::vector<BackendChoice> explain_choice(const AnyProblem& problem, const Backend& chosen) {
  std::vector<BackendChoice> choices;
  bool behind = false;
  for (const Backend* backend : registry()) {
    BackendChoice choice{std::string(backend->name()), backend == &chosen, ""};
    if (!choice.chosen && !behind) choice.reason = reason_against(*backend, problem);
    behind = behind || choice.chosen;
    choices.push_back(choice);
  }
  return choices;
}

// "forward float32 ... -> cpu, ...; cuda: ..."
template <class AnyProblem>
void log_choice(const AnyProblem& problem, const Backend& chosen) {
  std::string line = text_of(describe(problem), " -> ", chosen.name(), ", ", chosen.kernel(problem));
  for (const Backend* backend : registry()) {
    if (backend == &chosen) break;
    line += text_of("; ", backend->name(), ": ", reason_against(*backend, problem));
  }
  write_log(line);
}

// Choose, check the workspace, log, compute.
template <class AnyCall>
void run_call(AnyCall& call, const std::string& wanted_backend, Workspace workspace, void* stream) {
  const Backend& backend = choose_backend(call.problem, wanted_backend);
  const std::size_t needed = backend.workspace_bytes(call.problem);
  if (workspace.data == nullptr && workspace.allocate != nullptr && needed > 0)
    workspace = {.data = workspace.allocate(workspace.owner, needed), .bytes = needed};
  check_workspace(workspace, needed);
  check_no_overlap(call.inputs, call.outputs, workspace, needed);
  if (logs_dispatch()) log_choice(call.problem, backend);
  call.arguments.stream = stream;
  backend.run(call.problem, call.arguments, workspace);
}

}  // namespace fsa
