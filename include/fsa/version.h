// SPDX-License-Identifier: Apache-2.0
// The one version number. CMake and the Python package read it from here.
#pragma once

#define FSA_VERSION_STRING "0.1.0"

namespace fsa {

/// The version of the library that is linked, "major.minor.patch".
const char* version();

}  // namespace fsa
