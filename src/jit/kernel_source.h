// SPDX-License-Identifier: Apache-2.0
// One kernel to compile. What it computes is no concern of this layer.
#pragma once

#include <cstdint>
#include <string>

#include "jit/hash.h"
#include "jit/source_bundle.h"

namespace fsa::jit {

struct KernelSource {
  std::string name;   // readable, fit for a file name: "forward_sm90_bf16_d128_causal_128x128"
  std::string arch;   // "sm_90a"
  std::string entry;  // the extern "C" kernel in `text`
  std::string text;   // a few lines that include files of the bundle

  // NVRTC's version is no part of it: packs must serve machines that have none.
  std::uint64_t identity() const {
    std::uint64_t value = hash(source_bundle_hash());
    for (const std::string* part : {&arch, &entry, &text}) value = hash(*part, hash("|", value));
    return value;
  }

  std::string file_name() const { return name + "-" + to_hex(identity()) + ".cubin"; }
};

}  // namespace fsa::jit
