// SPDX-License-Identifier: Apache-2.0
// Between processes: one of them compiles a kernel, the others wait for its file.
#pragma once

#include <string>

namespace fsa::jit {

// Held until destroyed, or until the process ends however it ends. Where no lock file can be made (a read-only
// disk, a file system without locks) or another process holds it for longer than `seconds`, nothing is held:
// compiling twice is a waste, waiting for ever would be worse.
class FileLock {
 public:
  explicit FileLock(const std::string& path, double seconds = 120);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  bool held() const { return held_; }

 private:
  int file_ = -1;
  bool held_ = false;
};

}  // namespace fsa::jit
