// SPDX-License-Identifier: Apache-2.0
// The environment variables of the library, each read once, at first use.
//
// | variable        | value                          | effect                                                  |
// |-----------------|--------------------------------|---------------------------------------------------------|
// | FSA_BACKEND     | a name of fsa::backends()      | backend of every call that does not name one itself     |
// | FSA_LOG         | dispatch                       | each call prints the backend it took, and why, on stderr |
// | FSA_NUM_THREADS | 1 ... 1024                     | threads of CPU calls; default: processors of the process |
// | FSA_CPU_TARGET  | a name of an instruction set   | forces it on the CPU backend; an error where it is missing |
// | FSA_NSA_ALGORITHM | auto, kv_outer, query_outer, off | Python: of selected attention where a call says auto   |
//
// For CUDA:
//
// | variable        | value                          | effect                                                  |
// |-----------------|--------------------------------|---------------------------------------------------------|
// | FSA_NVRTC_PATH  | a library or its folder        | the compiler NVRTC; default: see src/jit/nvrtc.h          |
// | FSA_JIT         | on, off                        | off: a kernel that is neither in a pack nor in the cache  |
// |                 |                                | is an error, not a compilation                           |
// | FSA_KERNEL_PATH | folders, separated by ':'      | packs of compiled kernels, asked before the cache         |
// | FSA_CACHE_DIR   | a folder                       | of kernels compiled here, and of the profile of selected  |
// |                 |                                | attention (Python); default: in ~/.cache                 |
#pragma once

#include <string_view>

namespace fsa::env {

std::string_view backend();  // empty when unset, as the other strings
std::string_view log();
int num_threads();  // 0 when unset; throws fsa::Error when it is not a whole number in 1 ... 1024
std::string_view cpu_target();
std::string_view nvrtc_path();
bool jit();  // true when unset; throws fsa::Error when it is neither on nor off
std::string_view kernel_path();
std::string_view cache_dir();

}  // namespace fsa::env
