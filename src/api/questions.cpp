// SPDX-License-Identifier: Apache-2.0
// Questions about a call that do not run it, and prefill. Outputs that do not exist yet are no error here;
// those that are given are checked.
#include "api/prepare.h"

namespace fsa {
namespace {

template <class Args>
std::size_t workspace_size_of(const Args& args) {
  const Call call = prepare(args, Purpose::shapes);
  return choose_backend(call.problem, args.options.backend).workspace_bytes(call.problem);
}

template <class Args>
Status support_of(const Args& args) {
  try {
    const Call call = prepare(args, Purpose::ask);
    const Backend& backend = choose_backend(call.problem, args.options.backend);
    if (args.workspace.data != nullptr || args.workspace.bytes != 0) {
      const std::size_t needed = backend.workspace_bytes(call.problem);
      check_workspace(args.workspace, needed);
      check_no_overlap(call.inputs, call.outputs, args.workspace, needed);
    }
    return {true, ""};
  } catch (const Error& error) {
    return {false, error.what()};
  }
}

}  // namespace

std::size_t workspace_size(const ForwardArgs& args) { return workspace_size_of(args); }
std::size_t workspace_size(const BackwardArgs& args) { return workspace_size_of(args); }
std::size_t workspace_size(const DecodeArgs& args) { return workspace_size_of(args); }

Status supports(const ForwardArgs& args) { return support_of(args); }
Status supports(const BackwardArgs& args) { return support_of(args); }
Status supports(const DecodeArgs& args) { return support_of(args); }

void prefill(const ForwardArgs& args) {
  Call call = prepare(args, Purpose::shapes);
  call.arguments.stream = args.stream;
  choose_backend(call.problem, args.options.backend).prefill(call.problem, call.arguments);
}

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  for (const Backend* backend : registry()) {
    const Availability availability = backend->availability();
    infos.push_back({std::string(backend->name()), availability.available, availability.description});
  }
  return infos;
}

}  // namespace fsa
