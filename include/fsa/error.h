// SPDX-License-Identifier: Apache-2.0
// The one exception type of the library.
#pragma once

#include <stdexcept>
#include <string>

#include "fsa/export.h"

namespace fsa {

enum class ErrorCode {
  invalid_argument,  ///< A value, shape or stride is wrong (Python: ValueError).
  type_mismatch,     ///< A dtype or device is wrong (Python: TypeError).
  unsupported,       ///< Valid, but not computed by this version (Python: NotImplementedError).
  device,            ///< The device or its driver failed (Python: RuntimeError).
  internal,          ///< A bug in this library (Python: RuntimeError).
};

/// Thrown by every function of the public API. The message names the argument, its value, the limit
/// and the way out. Nothing has been read from or written to a tensor's data when it is thrown by a
/// check of arguments.
class FSA_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace fsa
