// SPDX-License-Identifier: Apache-2.0
// The one version number. CMake and the Python package read it from here.
#pragma once

#include "fsa/export.h"

#define FSA_VERSION_STRING "0.1.0"

namespace fsa {

/// The version of the library that is linked, "major.minor.patch".
FSA_API const char* version();

}  // namespace fsa
