// SPDX-License-Identifier: Apache-2.0
// The CUDA backend of this version: it finds the devices and says what they are, and computes nothing.
#include "backend/cuda/driver.h"
#include "backend/registry.h"
#include "fsa/error.h"

namespace fsa {
namespace {

std::string describe(const cuda::DriverInfo& info) {
  if (!info.error.empty()) return info.error;
  const cuda::DeviceInfo& first = info.devices.front();
  std::string text = first.name + " (sm_" + std::to_string(first.major) + std::to_string(first.minor) + ")";
  if (info.devices.size() > 1) text = std::to_string(info.devices.size()) + " x " + text;
  return text + ", driver " + std::to_string(info.version / 1000) + "." +
         std::to_string(info.version % 1000 / 10) + ": this version has no CUDA kernels yet";
}

class CudaBackend final : public Backend {
 public:
  std::string_view name() const override { return "cuda"; }

  Availability availability() const override { return {false, describe(cuda::driver())}; }

  // Tensors on the CPU are answered without the driver, which takes long to initialise and does not
  // survive a fork.
  std::string reject(const Problem& problem) const override {
    if (problem.device.kind == DeviceKind::cpu) return "takes no tensors on the CPU";
    return describe(cuda::driver());
  }

  std::string kernel(const Problem&) const override { return "none"; }

  std::size_t workspace_bytes(const Problem&) const override { return 0; }

  bool merge(const MergeProblem&) const override { return false; }

  void run(const Problem&, const Arguments&, Workspace) const override {
    throw Error(ErrorCode::internal, "the CUDA backend was asked to run a problem that it rejects");
  }
};

}  // namespace

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

}  // namespace fsa
