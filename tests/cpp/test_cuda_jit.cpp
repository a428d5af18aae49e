// SPDX-License-Identifier: Apache-2.0
// Run-time compilation without a compiler and without a GPU: bundle, files, locks, stores.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "fsa/error.h"
#include "jit/cubin_file.h"
#include "jit/file_lock.h"
#include "jit/resources.h"
#include "jit/store.h"

namespace fsa::jit {
namespace {

namespace fs = std::filesystem;

class JitFiles : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "fsa_jit_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override {
    std::error_code error;
    fs::permissions(folder_, fs::perms::owner_all, error);
    fs::remove_all(folder_, error);
  }

  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder_))
      if (entry.is_regular_file()) names.push_back(entry.path().filename().string());
    return names;
  }

  std::string folder_;
  const KernelSource source_{"forward_test", "sm_90a", "fsa_forward", "text of the kernel"};
  const CubinFile file_{std::string("cubin\0bytes", 11), "log of the compiler", 13000, 2.5};
};

TEST(JitBundle, HoldsTheDeviceCode) {
  std::set<std::string> names;
  for (const SourceFile& file : source_bundle()) {
    EXPECT_TRUE(names.insert(file.name).second) << file.name;
    EXPECT_NE(std::string(file.text).find("SPDX-License-Identifier"), std::string::npos) << file.name;
  }
  EXPECT_TRUE(names.contains("sm90/forward.cuh"));
  EXPECT_TRUE(names.contains("core/params.h"));
  EXPECT_EQ(source_bundle_hash().size(), 16u);
  EXPECT_EQ(source_bundle_hash().find_first_not_of("0123456789abcdef"), std::string_view::npos);
}

TEST(JitBundle, EveryIncludeIsInIt) {
  std::set<std::string> names;
  for (const SourceFile& file : source_bundle()) names.insert(file.name);
  for (const SourceFile& file : source_bundle()) {
    const std::string text = file.text;
    for (std::size_t at = 0; (at = text.find("#include \"", at)) != std::string::npos;) {
      at += 10;
      const std::string included = text.substr(at, text.find('"', at) - at);
      EXPECT_TRUE(names.contains(included)) << file.name << " includes " << included;
    }
  }
}

TEST(JitSource, IdentityTellsKernelsApart) {
  const KernelSource source{"name", "sm_90a", "entry", "text"};
  KernelSource other = source;
  EXPECT_EQ(source.identity(), other.identity());
  for (std::string KernelSource::* part : {&KernelSource::arch, &KernelSource::entry, &KernelSource::text}) {
    other = source;
    other.*part += "x";
    EXPECT_NE(source.identity(), other.identity());
  }
  EXPECT_EQ(source.file_name(), "name-" + to_hex(source.identity()) + ".cubin");
}

TEST_F(JitFiles, RoundTrip) {
  const std::string bytes = encode(file_, 7);
  const auto read = decode(bytes, 7);
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->cubin, file_.cubin);
  EXPECT_EQ(read->log, file_.log);
  EXPECT_EQ(read->nvrtc_version, file_.nvrtc_version);
  EXPECT_EQ(read->seconds, file_.seconds);
}

TEST_F(JitFiles, DamagedForeignAndTornFilesReadAsAbsent) {
  const std::string bytes = encode(file_, 7);
  EXPECT_FALSE(decode(bytes, 8).has_value());
  EXPECT_FALSE(decode("", 7).has_value());
  EXPECT_FALSE(decode(bytes + "x", 7).has_value());
  for (std::size_t length = 0; length < bytes.size(); ++length)
    EXPECT_FALSE(decode(std::string_view(bytes).substr(0, length), 7).has_value()) << length;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string damaged = bytes;
    damaged[i] ^= 0x10;
    EXPECT_FALSE(decode(damaged, 7).has_value()) << "byte " << i;
  }
}

TEST_F(JitFiles, WritesWholeFilesOnly) {
  const std::string path = folder_ + "/a/b/file.cubin";
  EXPECT_EQ(write_whole(path, encode(file_, 7)), "");
  EXPECT_EQ(write_whole(path, encode(file_, 7)), "") << "over one that is there";
  EXPECT_TRUE(read_cubin(path, 7).has_value());
  EXPECT_EQ(files(), std::vector<std::string>{"file.cubin"});
}

TEST_F(JitFiles, WhatCannotBeWrittenIsReported) {
  std::ofstream(folder_ + "/file") << "in the way";
  EXPECT_NE(write_whole(folder_ + "/file/below.cubin", "bytes"), "");
  fs::create_directories(folder_ + "/taken.cubin/below");
  EXPECT_NE(write_whole(folder_ + "/taken.cubin", "bytes"), "");
  EXPECT_EQ(files(), std::vector<std::string>{"file"}) << "no part of a file stays behind";
  if (geteuid() == 0) return;  // root writes anywhere
  fs::create_directory(folder_ + "/locked");
  fs::permissions(folder_ + "/locked", fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_NE(write_whole(folder_ + "/locked/file.cubin", "bytes"), "");
}

TEST_F(JitFiles, OneHolderOfALock) {
  const std::string path = folder_ + "/kernel.lock";
  {
    const FileLock first(path);
    EXPECT_TRUE(first.held());
    EXPECT_FALSE(FileLock(path, 0).held());
  }
  EXPECT_TRUE(FileLock(path, 0).held());
  std::ofstream(folder_ + "/file") << "in the way";
  EXPECT_FALSE(FileLock(folder_ + "/file/kernel.lock").held()) << "without waiting";
}

TEST_F(JitFiles, PacksComeBeforeTheCache) {
  const std::string pack = folder_ + "/pack", cache = folder_ + "/cache";
  const Stores stores{{folder_ + "/missing", pack}, cache, false};
  EXPECT_FALSE(find(source_, stores).has_value());
  ASSERT_EQ(write_whole(path_in(cache, source_), encode(file_, source_.identity())), "");
  EXPECT_EQ(find(source_, stores)->origin, path_in(cache, source_));
  ASSERT_EQ(write_whole(path_in(pack, source_), encode(file_, source_.identity())), "");
  EXPECT_EQ(find(source_, stores)->origin, path_in(pack, source_));
  std::ofstream(path_in(pack, source_), std::ios::app) << "damage";
  EXPECT_EQ(find(source_, stores)->origin, path_in(cache, source_));
}

TEST_F(JitFiles, AMissWithoutCompilingNamesTheCommand) {
  try {
    static_cast<void>(find_or_compile(source_, {{}, folder_, false}));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::device);
    EXPECT_NE(std::string(error.what()).find("FSA_JIT is off"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("fsa-kernels prefill forward_test"), std::string::npos);
  }
}

TEST_F(JitFiles, ManyThreadsReadOneFile) {
  ASSERT_EQ(write_whole(path_in(folder_, source_), encode(file_, source_.identity())), "");
  std::vector<std::string> cubins(8);
  std::vector<std::thread> threads;
  for (std::string& cubin : cubins)
    threads.emplace_back([&] { cubin = find_or_compile(source_, {{}, folder_, true}).file.cubin; });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& cubin : cubins) EXPECT_EQ(cubin, file_.cubin);
}

TEST(JitResources, ReadsTheCompilersReport) {
  const Resources found = resources_of(
      {"no machine code",
       "ptxas info    : Function properties for fsa_forward\n"
       "ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
       "ptxas info    : Used 168 registers, used 16 barriers\n"
       "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n",
       13000, 1});
  EXPECT_EQ(found.registers, 168);
  EXPECT_EQ(found.stack_bytes, 8);
  EXPECT_EQ(found.spill_bytes, 16);
  EXPECT_EQ(found.instructions, 0);
  ASSERT_EQ(found.notes.size(), 1u);
  EXPECT_NE(found.notes[0].find("serialized"), std::string::npos);
  EXPECT_EQ(resources_of({}).registers, -1);
}

}  // namespace
}  // namespace fsa::jit
