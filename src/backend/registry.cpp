// SPDX-License-Identifier: Apache-2.0
#include "backend/registry.h"

#include <string>

#include "core/env.h"
#include "fsa/error.h"

namespace fsa {

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::forward:
      return "forward";
    case Operation::backward:
      return "backward";
    case Operation::decode:
      break;
  }
  return "decode";
}

const char* name_of(NsaOperation operation) {
  switch (operation) {
    case NsaOperation::compress:
      return "nsa compress";
    case NsaOperation::compress_backward:
      return "nsa compress_backward";
    case NsaOperation::select_blocks:
      return "nsa select_blocks";
    case NsaOperation::selected_forward:
      return "nsa selected_forward";
    case NsaOperation::selected_backward:
      return "nsa selected_backward";
    case NsaOperation::combine:
      return "nsa combine";
    case NsaOperation::combine_backward:
      break;
  }
  return "nsa combine_backward";
}

namespace {

std::string place(Device device) {
  return device.kind == DeviceKind::cpu ? "the CPU" : "cuda:" + std::to_string(device.index);
}

// "cuda" alone takes tensors in device memory; asking the others would only hide where the tensors are.
template <class AnyProblem>
bool wrong_place(const Backend& backend, const AnyProblem& problem) {
  return problem.device.kind != DeviceKind::cpu && backend.name() != "cuda";
}

template <class AnyProblem>
std::string reason_against(const Backend& backend, const AnyProblem& problem) {
  if (wrong_place(backend, problem))
    return "computes on the CPU, but the tensors are on " + place(problem.device);
  return backend.reject(problem);
}

std::string known_names() {
  std::string names;
  for (const Backend* backend : registry()) {
    if (!names.empty()) names += ", ";
    names += backend->name();
  }
  return names;
}

// `source` is what the user wrote the name into: the argument or the environment variable.
template <class AnyProblem>
const Backend& named_backend(const AnyProblem& problem, std::string_view wanted, const std::string& source) {
  const std::string quoted = source + ": \"" + std::string(wanted) + "\"";
  for (const Backend* backend : registry()) {
    if (backend->name() != wanted) continue;
    if (wrong_place(*backend, problem))
      throw Error(ErrorCode::type_mismatch, quoted + " computes on the CPU, but the tensors are on " +
                                                place(problem.device) + "; move them to the CPU first");
    const std::string reason = backend->reject(problem);
    if (!reason.empty())
      throw Error(ErrorCode::unsupported, quoted + " cannot compute this " + name_of(problem.operation) +
                                              ": " + reason +
                                              "; leave the backend out to let the library choose");
    return *backend;
  }
  throw Error(ErrorCode::invalid_argument,
              quoted + " is not a backend of this build; known: " + known_names());
}

template <class AnyProblem>
const Backend& choose(const AnyProblem& problem, std::string_view wanted) {
  if (!wanted.empty()) return named_backend(problem, wanted, "backend");
  if (!env::backend().empty()) return named_backend(problem, env::backend(), "FSA_BACKEND");
  std::string reasons;
  for (const Backend* backend : registry()) {
    const std::string reason = reason_against(*backend, problem);
    if (reason.empty()) return *backend;
    reasons += "\n  " + std::string(backend->name()) + ": " + reason;
  }
  throw Error(ErrorCode::unsupported, "no backend computes this " + std::string(name_of(problem.operation)) +
                                          " with tensors on " + place(problem.device) + ":" + reasons);
}

}  // namespace

std::span<const Backend* const> registry() {
  static const Backend* const backends[] = {
#if FSA_WITH_CUDA
      &cuda_backend(),
#endif
      &cpu_backend(),
      &reference_backend(),
  };
  return backends;
}

const Backend& choose_backend(const Problem& problem, std::string_view wanted) {
  return choose(problem, wanted);
}

const Backend& choose_backend(const NsaProblem& problem, std::string_view wanted) {
  return choose(problem, wanted);
}

// Asking for the kernel, the workspace or a run of what was rejected is a mistake of the caller.
std::string Backend::reject(const NsaProblem&) const {
  return "native sparse attention is not implemented for it in this version";
}
std::string Backend::kernel(const NsaProblem& problem) const {
  throw Error(ErrorCode::unsupported, reject(problem));
}
std::size_t Backend::workspace_bytes(const NsaProblem& problem) const {
  throw Error(ErrorCode::unsupported, reject(problem));
}
void Backend::run(const NsaProblem& problem, const NsaArguments&, Workspace) const {
  throw Error(ErrorCode::unsupported, reject(problem));
}

}  // namespace fsa
