// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/reference.h"

#include "backend/cpu/merge.h"
#include "backend/cpu/reference_nsa.h"
#include "backend/registry.h"

namespace fsa {
namespace {

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }

  Availability availability() const override { return {true, "float64, one plain loop per rule; slow"}; }

  std::string reject(const Problem& problem) const override {
    if (problem.device.kind != DeviceKind::cpu) return "computes on the CPU only";
    if (problem.operation == Operation::backward && problem.paged)
      return "has no backward through paged keys and values";
    return {};
  }

  std::string kernel(const Problem&) const override { return "float64 loops"; }

  std::size_t workspace_bytes(const Problem&) const override { return 0; }

  bool merge(const MergeProblem& problem) const override {
    if (problem.device.kind != DeviceKind::cpu) return false;
    merge_states(problem);
    return true;
  }

  void run(const Problem& problem, const Arguments& args, Workspace) const override {
    switch (problem.operation) {
      case Operation::forward:
        return reference::forward(problem, args);
      case Operation::backward:
        return reference::backward(problem, args);
      case Operation::decode:
        return reference::decode(problem, args);
    }
  }

  std::string reject(const NsaProblem& problem) const override {
    return problem.device.kind == DeviceKind::cpu ? "" : "computes on the CPU only";
  }

  std::string kernel(const NsaProblem&) const override { return "float64 loops"; }

  std::size_t workspace_bytes(const NsaProblem&) const override { return 0; }

  void run(const NsaProblem& problem, const NsaArguments& args, Workspace) const override {
    switch (problem.operation) {
      case NsaOperation::compress:
        return reference::compress(problem, args);
      case NsaOperation::compress_backward:
        return reference::compress_backward(problem, args);
      case NsaOperation::select_blocks:
        return reference::select_blocks(problem, args);
      case NsaOperation::selected_forward:
        return reference::selected_forward(problem, args);
      case NsaOperation::selected_backward:
        return reference::selected_backward(problem, args);
      case NsaOperation::combine:
        return reference::combine(problem, args);
      case NsaOperation::combine_backward:
        return reference::combine_backward(problem, args);
    }
  }
};

}  // namespace

const Backend& reference_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace fsa
