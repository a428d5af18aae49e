// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/reference.h"

#include "backend/cpu/merge.h"
#include "backend/registry.h"

namespace fsa {
namespace {

class ReferenceBackend final : public Backend {
 public:
  using Backend::kernel;
  using Backend::reject;
  using Backend::run;
  using Backend::workspace_bytes;

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
};

}  // namespace

const Backend& reference_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace fsa
