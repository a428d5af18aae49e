// SPDX-License-Identifier: Apache-2.0
// The device code of kernels/, embedded by cmake/FsaKernels.cmake.
#pragma once

#include <span>
#include <string_view>

namespace fsa::jit {

struct SourceFile {
  const char* name;  // as #include names it: "sm90/forward.cuh"
  const char* text;
};

std::span<const SourceFile> source_bundle();

// 16 hexadecimal digits over names and texts: kernels of another bundle are other kernels.
std::string_view source_bundle_hash();

}  // namespace fsa::jit
