// SPDX-License-Identifier: Apache-2.0
// What a backend is to the API layer: a name, a reason for "no", a workspace formula, and run().
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "core/nsa_problem.h"
#include "core/problem.h"

namespace fsa {

const char* name_of(Operation operation);  // "forward"
const char* name_of(NsaOperation operation);

struct Availability {
  bool available = false;
  std::string description;  // what it is, or why it is not available
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  virtual Availability availability() const = 0;

  // Empty when the problem can be computed; otherwise why not, as the end of a sentence that starts with
  // the backend's name.
  virtual std::string reject(const Problem& problem) const = 0;

  // The kernel that run() would use, with its instruction set.
  virtual std::string kernel(const Problem& problem) const = 0;

  // A function of the problem alone, so that it can be asked before outputs exist.
  virtual std::size_t workspace_bytes(const Problem& problem) const = 0;

  // Gets the kernels of run() ready, without running them. Of the arguments only the stream and the presence
  // of tensors count.
  virtual void prefill(const Problem&, const Arguments&) const {}

  // Joins partial results; false when this backend cannot (another device).
  virtual bool merge(const MergeProblem& problem) const = 0;

  // Arguments are checked, workspace.bytes >= workspace_bytes(problem).
  virtual void run(const Problem& problem, const Arguments& args, Workspace workspace) const = 0;

  // The same four for the parts of native sparse attention. A backend without them says no.
  virtual std::string reject(const NsaProblem& problem) const;
  virtual std::string kernel(const NsaProblem& problem) const;
  virtual std::size_t workspace_bytes(const NsaProblem& problem) const;
  virtual void run(const NsaProblem& problem, const NsaArguments& args, Workspace workspace) const;

  // Forward over compressed keys and the selection of blocks from its probabilities, in one pass and without a
  // workspace. False, and nothing done, where two calls of run() are the way.
  virtual bool run_with_selection(const Problem&, const Arguments&, const NsaProblem&,
                                  const NsaArguments&) const {
    return false;
  }
};

// Every backend of this build in the order in which they are asked; the reference is the last.
std::span<const Backend* const> registry();

// First backend that computes the problem, or the one that `wanted` names. Throws fsa::Error with every
// backend's reason when there is none.
const Backend& choose_backend(const Problem& problem, std::string_view wanted);
const Backend& choose_backend(const NsaProblem& problem, std::string_view wanted);

}  // namespace fsa
