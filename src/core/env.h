// SPDX-License-Identifier: Apache-2.0
// The environment variables of the library, each read once, at first use.
//
// | variable        | value                          | effect                                                  |
// |-----------------|--------------------------------|---------------------------------------------------------|
// | FSA_BACKEND     | a name of fsa::backends()      | backend of every call that does not name one itself     |
// | FSA_LOG         | dispatch                       | each call prints the backend it took, and why, on stderr |
// | FSA_NUM_THREADS | 1 ... 1024                     | threads of CPU calls; default: processors of the process |
// | FSA_CPU_TARGET  | a name of an instruction set   | forces it on the CPU backend; an error where it is missing |
#pragma once

#include <string_view>

namespace fsa::env {

std::string_view backend();  // empty when unset, as the other strings
std::string_view log();
int num_threads();  // 0 when unset; throws fsa::Error when it is not a whole number in 1 ... 1024
std::string_view cpu_target();

}  // namespace fsa::env
