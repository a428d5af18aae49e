// SPDX-License-Identifier: Apache-2.0
// The checks of one operation, up to the choice of a backend, and that choice.
#pragma once

#include <string>

#include "api/call.h"
#include "backend/backend.h"

namespace fsa {

// `args` must outlive the call that is returned.
Call prepare(const ForwardArgs& args, Purpose purpose);
Call prepare(const BackwardArgs& args, Purpose purpose);
Call prepare(const DecodeArgs& args, Purpose purpose);

// The last steps of every operation: choose, log, check the workspace, run.
void run(Call& call, const std::string& wanted_backend, Workspace workspace, void* stream);

}  // namespace fsa
