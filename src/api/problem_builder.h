// SPDX-License-Identifier: Apache-2.0
// From the public argument structs to what a backend gets: every input and option checked, defaults filled in.
#pragma once

#include "api/call.h"

namespace fsa {

// Checks inputs and options and fills everything but outputs, tensors of earlier calls and the skip map. The
// call keeps pointers into `inputs`.
Call build_call(Operation operation, const AttentionInputs& inputs, const AttentionOptions& options,
                Purpose purpose);

}  // namespace fsa
