// SPDX-License-Identifier: Apache-2.0
#include "core/log.h"

#include <cstdio>

#include "core/env.h"

namespace fsa {

bool logs_dispatch() {
  static const bool enabled = [] {
    const std::string_view wanted = env::log();
    if (!wanted.empty() && wanted != "dispatch")
      write_log("FSA_LOG: \"" + std::string(wanted) + "\" is not known and has no effect; known: dispatch");
    return wanted == "dispatch";
  }();
  return enabled;
}

void write_log(const std::string& line) {
  const std::string text = "fsa: " + line + "\n";
  std::fwrite(text.data(), 1, text.size(), stderr);
}

}  // namespace fsa
