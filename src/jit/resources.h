// SPDX-License-Identifier: Apache-2.0
// What the compiler made of a kernel, read from its log and from the machine code. Needs no disassembler.
#pragma once

#include <string>
#include <vector>

#include "jit/cubin_file.h"

namespace fsa::jit {

struct Resources {
  int registers = -1;  // -1: the log does not say
  int stack_bytes = -1;
  int spill_bytes = -1;            // stores and loads
  int instructions = 0;            // of all functions
  int tensor_multiplies = 0;       // HGMMA
  int local_accesses = 0;          // LDL, STL
  int barriers = 0;                // BAR
  std::vector<std::string> notes;  // lines of the log that tell of a lost optimisation
};

// For sm_90a, whose instructions are 16 bytes with the operation in the low nine bits.
Resources resources_of(const CubinFile& file);

}  // namespace fsa::jit
