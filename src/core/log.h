// SPDX-License-Identifier: Apache-2.0
// Diagnostics on stderr, switched on by FSA_LOG.
#pragma once

#include <string>

namespace fsa {

// FSA_LOG=dispatch: each call says which backend it took and why the ones before it were passed over.
bool logs_dispatch();

// One line, prefixed "fsa: ", written in one piece so that lines of several threads do not mix.
void write_log(const std::string& line);

}  // namespace fsa
