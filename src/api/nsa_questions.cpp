// SPDX-License-Identifier: Apache-2.0
// Questions about a call that do not run it. Outputs, and the data of all but the small index tensors, may be
// absent.
#include "api/choice.h"
#include "api/nsa_call.h"

namespace fsa {
namespace {

const std::string& wanted_backend(const nsa::SelectBlocksArgs& args) { return args.backend; }
template <class Args>
const std::string& wanted_backend(const Args& args) {
  return args.options.backend;
}

template <class Args>
std::size_t workspace_size_of(const Args& args) {
  const NsaCall call = prepare(args, Purpose::shapes);
  return choose_backend(call.problem, wanted_backend(args)).workspace_bytes(call.problem);
}

template <class Args>
nsa::Choice choice_of(const Args& args) {
  const NsaCall call = prepare(args, Purpose::shapes);
  const Backend& backend = choose_backend(call.problem, wanted_backend(args));
  return {std::string(backend.name()), backend.kernel(call.problem), explain_choice(call.problem, backend),
          backend.workspace_bytes(call.problem)};
}

}  // namespace

namespace nsa {

std::size_t workspace_size(const CompressArgs& args) { return workspace_size_of(args); }
std::size_t workspace_size(const CompressBackwardArgs& args) { return workspace_size_of(args); }
std::size_t workspace_size(const SelectBlocksArgs& args) { return workspace_size_of(args); }
std::size_t workspace_size(const SelectedForwardArgs& args) { return workspace_size_of(args); }
std::size_t workspace_size(const SelectedBackwardArgs& args) { return workspace_size_of(args); }

Choice explain(const CompressArgs& args) { return choice_of(args); }
Choice explain(const SelectBlocksArgs& args) { return choice_of(args); }
Choice explain(const SelectedForwardArgs& args) { return choice_of(args); }
Choice explain(const SelectedBackwardArgs& args) { return choice_of(args); }

}  // namespace nsa
}  // namespace fsa
