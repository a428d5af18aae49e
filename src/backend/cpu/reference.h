// SPDX-License-Identifier: Apache-2.0
// The float64 oracle: every operation of the library in obvious loops, for tests, for float64 inputs, and as
// the last resort of dispatch. Tensors of any float dtype are read as float64 and rounded once when written.
#pragma once

#include "core/problem.h"

namespace fsa::reference {

void forward(const Problem& problem, const Arguments& args);
void backward(const Problem& problem, const Arguments& args);
void decode(const Problem& problem, const Arguments& args);

}  // namespace fsa::reference
