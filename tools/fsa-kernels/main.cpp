// SPDX-License-Identifier: Apache-2.0
// fsa-kernels: the device kernels of this build, without a GPU.
//
//   fsa-kernels list    [PATTERN...] [--all]        names; --all: also those that are not shipped
//   fsa-kernels compile [PATTERN...] [--jobs N]     compiles, and fails on what the report calls wrong
//   fsa-kernels report  [PATTERN...]                registers, spills, instructions of the kernels in the store
//   fsa-kernels prefill [PATTERN...] [--output DIR] [--jobs N]
//                                                   compiles what is missing into the cache, or into a pack
//   fsa-kernels inspect PATTERN...                  source text and compiler log
//   fsa-kernels info                                compiler, bundle, folders
//
// A pattern is the name of any kernel, or the beginning of the name of a shipped one; none means all that are
// shipped. A pack is used when FSA_KERNEL_PATH names it, or
// when it is the folder fsa_kernels beside the library.
#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdio>
#include <exception>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "backend/cuda/dispatch.h"
#include "fsa/error.h"
#include "jit/nvrtc.h"
#include "jit/resources.h"
#include "jit/store.h"

namespace fsa {
namespace {

constexpr const char* kUsage =
    "usage: fsa-kernels list|compile|report|prefill|inspect|info [PATTERN...] [--all] [--output DIR] [--jobs "
    "N]\n"
    "       PATTERN is the name of any kernel, or the beginning of the name of a shipped one\n";

struct Arguments {
  std::string command;
  std::vector<std::string> patterns;
  std::string output;
  unsigned jobs = 1;
  bool all = false;
};

struct Kernel {
  jit::KernelSource source;
  unsigned register_limit;  // a block gets no more
  unsigned shared_bytes;
  bool multiplies;  // on the tensor cores
};

Kernel kernel_of(const cuda::KernelConfig& config) {
  // 64 K registers of a processor, handed out to a thread in eights; a thread has at most 255.
  const unsigned limit = std::min(255u, 65536 / cuda::threads_of(config) / 8 * 8);
  return {cuda::source_of(config), limit, cuda::shared_bytes_of(config),
          config.kind == cuda::KernelKind::forward || config.kind == cuda::KernelKind::backward};
}

std::vector<Kernel> chosen_kernels(const std::vector<std::string>& patterns) {
  std::vector<Kernel> chosen;
  if (patterns.empty())
    for (const cuda::KernelConfig& config : cuda::shipped_kernels()) chosen.push_back(kernel_of(config));
  for (const std::string& pattern : patterns) {
    const std::size_t before = chosen.size();
    for (const cuda::KernelConfig& config : cuda::reachable_kernels())
      if (cuda::name_of(config) == pattern) chosen.push_back(kernel_of(config));
    if (chosen.size() > before) continue;
    for (const cuda::KernelConfig& config : cuda::shipped_kernels())
      if (cuda::name_of(config).starts_with(pattern)) chosen.push_back(kernel_of(config));
    if (chosen.size() == before)
      throw Error(ErrorCode::invalid_argument, "\"" + pattern +
                                                   "\" is no kernel's name, and no shipped one's begins so; "
                                                   "fsa-kernels list --all prints them");
  }
  return chosen;
}

// Bytes of stack that ptxas leaves a kernel where every way tried leaves more (docs/kernels/backward_sm90.md,
// "Registers"); for all others 0. Their cost has not been measured.
int known_stack_bytes(const std::string& name) {
  if (name.starts_with("split_columns_sm90_")) return 32;  // eight counters, in a kernel of 6 us
  if (!name.starts_with("backward_sm90_")) return 0;
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (has("_blocks")) return 24;
  if (has("_bits")) return 32;
  if (has("_deterministic")) return 16;  // in the adders
  if (has("_bands")) return 16;          // once a key tile
  return has("gate") ? 8 : 0;
}

// What is wrong with a compiled kernel; empty when nothing is.
std::string verdict(const Kernel& kernel, const jit::Resources& found) {
  std::string wrong;
  const auto add = [&](bool bad, const std::string& what) {
    if (bad) wrong += (wrong.empty() ? "" : ", ") + what;
  };
  add(found.registers < 0 || found.registers > static_cast<int>(kernel.register_limit),
      "registers over " + std::to_string(kernel.register_limit));
  const bool uses_local = found.stack_bytes != 0 || found.spill_bytes != 0 || found.local_accesses != 0;
  add(uses_local && (found.stack_bytes == 0 || found.stack_bytes > known_stack_bytes(kernel.source.name)),
      "local memory");
  add(kernel.multiplies && found.tensor_multiplies == 0, "no HGMMA");
  for (const std::string& note : found.notes) add(true, note);
  return wrong;
}

void print_header() {
  std::printf("%-52s %8s %9s %6s %6s %6s %6s %6s %5s %7s %6s  %s\n", "kernel", "seconds", "registers",
              "limit", "stack", "spill", "local", "HGMMA", "BAR", "shared", "instr", "verdict");
}

bool print_row(const Kernel& kernel, const jit::CubinFile& file) {
  const jit::Resources found = jit::resources_of(file);
  const std::string wrong = verdict(kernel, found);
  std::printf("%-52s %8.1f %9d %6u %6d %6d %6d %6d %5d %7u %6d  %s\n", kernel.source.name.c_str(),
              file.seconds, found.registers, kernel.register_limit, found.stack_bytes, found.spill_bytes,
              found.local_accesses, found.tensor_multiplies, found.barriers, kernel.shared_bytes,
              found.instructions,
              !wrong.empty()          ? wrong.c_str()
              : found.stack_bytes > 0 ? "good (known local memory)"
                                      : "good");
  std::fflush(stdout);
  return wrong.empty();
}

// Runs `work` on each kernel by several threads; true when all returned true. A kernel that fails does not keep the
// others from being compiled: its error is printed.
template <class Work>
bool for_each_kernel(const std::vector<Kernel>& kernels, unsigned jobs, Work work) {
  std::atomic<std::size_t> next = 0;
  std::atomic<bool> good = true;
  std::mutex mutex;
  const auto take = [&] {
    for (std::size_t i; (i = next++) < kernels.size();) {
      try {
        if (!work(kernels[i], mutex)) good = false;
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        std::fprintf(stderr, "fsa-kernels: %s\n", error.what());
        good = false;
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < jobs; ++i) threads.emplace_back(take);
  take();
  for (std::thread& thread : threads) thread.join();
  return good;
}

int list(const Arguments& args) {
  if (args.all) {
    for (const cuda::KernelConfig& config : cuda::reachable_kernels())
      std::printf("%s\n", cuda::name_of(config).c_str());
    return 0;
  }
  for (const Kernel& kernel : chosen_kernels(args.patterns)) std::printf("%s\n", kernel.source.name.c_str());
  return 0;
}

int compile(const Arguments& args) {
  const std::vector<Kernel> kernels = chosen_kernels(args.patterns);
  print_header();
  const bool good = for_each_kernel(kernels, args.jobs, [](const Kernel& kernel, std::mutex& mutex) {
    const jit::Found found = jit::compile_into(kernel.source, "");
    const std::lock_guard lock(mutex);
    return print_row(kernel, found.file);
  });
  std::printf("%zu kernels of bundle %s by NVRTC %d.%d: %s\n", kernels.size(),
              std::string(jit::source_bundle_hash()).c_str(), jit::nvrtc().version / 1000,
              jit::nvrtc().version % 1000 / 10, good ? "all good" : "NOT ALL GOOD");
  return good ? 0 : 1;
}

int report(const Arguments& args) {
  const jit::Stores stores = jit::Stores::from_environment();
  print_header();
  int missing = 0;
  bool good = true;
  for (const Kernel& kernel : chosen_kernels(args.patterns)) {
    const auto found = jit::find(kernel.source, stores);
    if (found)
      good = print_row(kernel, found->file) && good;
    else
      ++missing;
  }
  if (missing > 0) std::printf("%d kernels are not compiled; fsa-kernels prefill compiles them\n", missing);
  return good ? 0 : 1;
}

int prefill(const Arguments& args) {
  const std::vector<Kernel> kernels = chosen_kernels(args.patterns);
  jit::Stores stores = jit::Stores::from_environment();
  if (!args.output.empty()) stores = {.packs = {}, .cache = args.output};
  if (stores.cache.empty())
    throw Error(ErrorCode::invalid_argument, "there is no cache folder; set FSA_CACHE_DIR or give --output");
  stores.may_compile = true;
  const bool good = for_each_kernel(kernels, args.jobs, [&](const Kernel& kernel, std::mutex& mutex) {
    const jit::Found found = jit::find_or_compile(kernel.source, stores);
    const std::lock_guard lock(mutex);
    std::printf("%-52s %s\n", kernel.source.name.c_str(), found.origin.c_str());
    if (!found.warning.empty()) std::printf("  %s\n", found.warning.c_str());
    std::fflush(stdout);
    return found.warning.empty();
  });
  std::printf("%zu kernels in %s\n", kernels.size(), stores.cache.c_str());
  return good ? 0 : 1;
}

int inspect(const Arguments& args) {
  if (args.patterns.empty()) throw Error(ErrorCode::invalid_argument, "inspect needs the name of a kernel");
  const jit::Stores stores = jit::Stores::from_environment();
  for (const Kernel& kernel : chosen_kernels(args.patterns)) {
    const jit::Found found = jit::find_or_compile(kernel.source, stores);
    std::printf("// %s, %s\n// from %s\n%s\n%s\n", kernel.source.name.c_str(), kernel.source.arch.c_str(),
                found.origin.c_str(), kernel.source.text.c_str(), found.file.log.c_str());
    print_header();
    print_row(kernel, found.file);
  }
  return 0;
}

int info(const Arguments&) {
  const jit::Stores stores = jit::Stores::from_environment();
  const jit::NvrtcInfo& compiler = jit::nvrtc();
  std::printf("bundle  %s\n", std::string(jit::source_bundle_hash()).c_str());
  if (compiler.error.empty())
    std::printf("NVRTC   %d.%d, %s\n", compiler.version / 1000, compiler.version % 1000 / 10,
                compiler.path.c_str());
  else
    std::printf("NVRTC   %s\n", compiler.error.c_str());
  for (const std::string& pack : stores.packs) std::printf("pack    %s\n", pack.c_str());
  std::printf("cache   %s\n", stores.cache.empty() ? "none" : stores.cache.c_str());
  return 0;
}

Arguments parse(int count, char** values) {
  Arguments args;
  args.jobs = std::max(1u, std::thread::hardware_concurrency());
  for (int i = 1; i < count; ++i) {
    const std::string_view value = values[i];
    if (value == "--output" || value == "--jobs") {
      if (++i == count)
        throw Error(ErrorCode::invalid_argument, std::string(value) + ": its value is missing");
      const std::string_view text = values[i];
      if (value == "--output") {
        args.output = text;
        continue;
      }
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), args.jobs);
      if (error != std::errc() || end != text.data() + text.size() || args.jobs < 1 || args.jobs > 256)
        throw Error(ErrorCode::invalid_argument,
                    "--jobs: \"" + std::string(text) + "\", must be from 1 to 256");
    } else if (value == "--all") {
      args.all = true;
    } else if (value.starts_with("-")) {
      throw Error(ErrorCode::invalid_argument, std::string(value) + ": not an option\n" + kUsage);
    } else if (args.command.empty()) {
      args.command = value;
    } else {
      args.patterns.emplace_back(value);
    }
  }
  return args;
}

int run(int count, char** values) {
  const Arguments args = parse(count, values);
  for (const auto& [name, function] : {std::pair{"list", &list},
                                       {"compile", &compile},
                                       {"report", &report},
                                       {"prefill", &prefill},
                                       {"inspect", &inspect},
                                       {"info", &info}})
    if (args.command == name) return function(args);
  std::fputs(kUsage, stderr);
  return 2;
}

}  // namespace
}  // namespace fsa

int main(int count, char** values) {
  try {
    return fsa::run(count, values);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fsa-kernels: %s\n", error.what());
    return 1;
  }
}
