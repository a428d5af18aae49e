// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 with one Hopper GPU that computes nothing and writes down what it is asked. An image is the name of
// its kernel.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fsa::test {

struct DriverCall {
  std::string kernel;  // empty: a fill
  unsigned blocks = 0;
  unsigned threads = 0;
  bool early = false;               // launched without waiting for the end of the kernel before
  const void* parameter = nullptr;  // its first eight bytes, where it has those alone; of a fill: the address
  std::size_t bytes = 0;            // of a fill

  friend bool operator==(const DriverCall&, const DriverCall&) = default;
};

struct FakeDriver {
  std::vector<DriverCall> calls;  // on any stream, in their order
  std::vector<std::string> loaded;
  bool capturing = false;  // a graph: nothing can be loaded
};

FakeDriver& fake_driver();

}  // namespace fsa::test
