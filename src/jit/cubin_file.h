// SPDX-License-Identifier: Apache-2.0
// A compiled kernel as a file of the disk cache or of a pack. A file that is torn, foreign or of another kernel
// reads as absent.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "jit/kernel_source.h"

namespace fsa::jit {

struct CubinFile {
  std::string cubin;
  std::string log;
  int nvrtc_version = 0;
  double seconds = 0;  // that the compilation took
};

std::string encode(const CubinFile& file, std::uint64_t identity);
std::optional<CubinFile> decode(std::string_view bytes, std::uint64_t identity);

std::optional<CubinFile> read_cubin(const std::string& path, std::uint64_t identity);

// Appears whole or not at all. Empty on success, else why the file could not be written (a read-only or full
// disk, for one), which is never fatal.
std::string write_whole(const std::string& path, std::string_view bytes);

}  // namespace fsa::jit
