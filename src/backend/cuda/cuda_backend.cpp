// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/backward.h"
#include "backend/cuda/backward_dispatch.h"
#include "backend/cuda/dispatch.h"
#include "backend/cuda/driver.h"
#include "backend/cuda/forward.h"
#include "backend/registry.h"
#include "fsa/error.h"

namespace fsa {
namespace {

// Everything the kernels need is sm_90a, which no other architecture runs.
bool is_hopper(const cuda::DeviceInfo& device) { return device.major == 9 && device.minor == 0; }

std::string architecture(const cuda::DeviceInfo& device) {
  return device.name + " (sm_" + std::to_string(device.major) + std::to_string(device.minor) + ")";
}

std::string reject_device(const cuda::DriverInfo& info, int index) {
  if (!info.error.empty()) return info.error;
  if (index < 0 || static_cast<std::size_t>(index) >= info.devices.size())
    return "the driver has " + std::to_string(info.devices.size()) +
           " devices, but the tensors are on cuda:" + std::to_string(index);
  const cuda::DeviceInfo& device = info.devices[static_cast<std::size_t>(index)];
  return is_hopper(device) ? "" : "computes on Hopper GPUs (sm_90), not on " + architecture(device);
}

class CudaBackend final : public Backend {
 public:
  using Backend::kernel;
  using Backend::reject;
  using Backend::run;
  using Backend::workspace_bytes;

  std::string_view name() const override { return "cuda"; }

  Availability availability() const override {
    const cuda::DriverInfo& info = cuda::driver();
    if (!info.error.empty()) return {false, info.error};
    std::string text;
    bool usable = false;
    for (const cuda::DeviceInfo& device : info.devices) {
      text += (text.empty() ? "" : ", ") + architecture(device);
      usable = usable || is_hopper(device);
    }
    text +=
        "; driver " + std::to_string(info.version / 1000) + "." + std::to_string(info.version % 1000 / 10);
    return {usable,
            usable ? text + "; forward and backward on Hopper GPUs" : text + "; needs a Hopper GPU (sm_90)"};
  }

  // Tensors on the CPU are answered without the driver, which takes long to initialise and does not
  // survive a fork.
  std::string reject(const Problem& problem) const override {
    if (problem.device.kind == DeviceKind::cpu) return "takes no tensors on the CPU";
    if (std::string reason = reject_device(cuda::driver(), problem.device.index); !reason.empty())
      return reason;
    if (problem.operation == Operation::decode) return "has no decode in this version; use attention()";
    return is_backward(problem) ? cuda::reject_backward(problem) : cuda::reject_forward(problem);
  }

  std::string kernel(const Problem& problem) const override {
    return cuda::name_of(is_backward(problem) ? cuda::backward_kernel(problem)
                                              : cuda::forward_kernel(problem));
  }

  std::size_t workspace_bytes(const Problem& problem) const override {
    return is_backward(problem) ? cuda::backward_workspace(problem).bytes
                                : cuda::forward_workspace(problem).bytes;
  }

  void prefill(const Problem& problem, const Arguments& args) const override {
    is_backward(problem) ? cuda::prefill_backward(problem, args) : cuda::prefill_forward(problem, args);
  }

  bool merge(const MergeProblem&) const override { return false; }

  void run(const Problem& problem, const Arguments& args, Workspace workspace) const override {
    if (problem.operation == Operation::decode)
      throw Error(ErrorCode::internal, "the CUDA backend was asked to run a problem that it rejects");
    is_backward(problem) ? cuda::run_backward(problem, args, workspace)
                         : cuda::run_forward(problem, args, workspace);
  }

 private:
  static bool is_backward(const Problem& problem) { return problem.operation == Operation::backward; }
};

}  // namespace

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

}  // namespace fsa
