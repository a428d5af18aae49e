// SPDX-License-Identifier: Apache-2.0
// Where compiled kernels come from: packs, the user's disk cache, the compiler.
//
// A pack and the cache are folders with the same inside: <bundle hash>/<arch>/<name>-<identity>.cubin. Packs are
// only read: those that FSA_KERNEL_PATH names (separated by ':'), then fsa_kernels beside the library. The cache
// is FSA_CACHE_DIR, else flash_sparse_attention in XDG_CACHE_HOME, else in ~/.cache.
#pragma once

#include <string>
#include <vector>

#include "jit/cubin_file.h"
#include "jit/kernel_source.h"

namespace fsa::jit {

struct Stores {
  std::vector<std::string> packs;
  std::string cache;  // empty: there is none
  bool may_compile = true;

  static Stores from_environment();
};

std::string path_in(const std::string& store, const KernelSource& source);

struct Found {
  CubinFile file;
  std::string origin;   // the path that it was read from, or "compiled"
  std::string warning;  // why it could not be kept; empty when it could
};

// One compilation, however many threads and processes ask at once. Throws fsa::Error: where compiling is needed
// but off, the message names the kernel and the command that fills a pack with it.
Found find_or_compile(const KernelSource& source, const Stores& stores);

// Compiles without looking, and writes into the store, with the source text beside the kernel.
Found compile_into(const KernelSource& source, const std::string& store);

// Packs and the cache only; nullopt when none has it.
std::optional<Found> find(const KernelSource& source, const Stores& stores);

// "run: fsa-kernels prefill NAME", with the whole sentence around it.
std::string prefill_hint(const KernelSource& source);

}  // namespace fsa::jit
