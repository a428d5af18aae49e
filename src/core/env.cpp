// SPDX-License-Identifier: Apache-2.0
#include "core/env.h"

#include <charconv>
#include <cstdlib>
#include <string>

#include "fsa/error.h"

namespace fsa::env {
namespace {

std::string read(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

// Copies: a later setenv in the program must not change what a running call sees.
struct Environment {
  std::string backend = read("FSA_BACKEND");
  std::string log = read("FSA_LOG");
  std::string num_threads = read("FSA_NUM_THREADS");
  std::string cpu_target = read("FSA_CPU_TARGET");
  std::string nvrtc_path = read("FSA_NVRTC_PATH");
  std::string jit = read("FSA_JIT");
  std::string kernel_path = read("FSA_KERNEL_PATH");
  std::string cache_dir = read("FSA_CACHE_DIR");
};

const Environment& environment() {
  static const Environment values;
  return values;
}

}  // namespace

std::string_view backend() { return environment().backend; }

std::string_view log() { return environment().log; }

int num_threads() {
  const std::string& text = environment().num_threads;
  if (text.empty()) return 0;
  int threads = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, threads);
  if (error != std::errc() || stop != end || threads < 1 || threads > 1024)
    throw Error(
        ErrorCode::invalid_argument,
        "FSA_NUM_THREADS: \"" + text + "\" is not a whole number from 1 to 1024; correct or unset it");
  return threads;
}

std::string_view cpu_target() { return environment().cpu_target; }

std::string_view nvrtc_path() { return environment().nvrtc_path; }

bool jit() {
  const std::string& text = environment().jit;
  if (text.empty() || text == "on") return true;
  if (text != "off")
    throw Error(ErrorCode::invalid_argument,
                "FSA_JIT: \"" + text + "\", must be on or off; correct or unset it");
  return false;
}

std::string_view kernel_path() { return environment().kernel_path; }

std::string_view cache_dir() { return environment().cache_dir; }

}  // namespace fsa::env
