// SPDX-License-Identifier: Apache-2.0
// Worker threads of the CPU backends. Which thread computes which item never changes a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fsa::cpu {

// A reference to a callable `void(std::int64_t item)`; valid while the callable lives.
class ItemFunction {
 public:
  template <class Callable>
    requires(!std::is_same_v<std::remove_cvref_t<Callable>, ItemFunction>)
  ItemFunction(Callable&& callable)  // NOLINT: implicit on purpose, so that a lambda can be passed
      : object_(const_cast<void*>(static_cast<const void*>(&callable))),
        call_([](void* object, std::int64_t item) {
          (*static_cast<std::remove_reference_t<Callable>*>(object))(item);
        }) {}
  void operator()(std::int64_t item) const { call_(object_, item); }

 private:
  void* object_;
  void (*call_)(void*, std::int64_t);
};

// Calls body(item) for every item in [0, count), in no particular order, on up to num_threads() threads, the
// caller among them. Returns when all are done. Runs on the caller alone when the pool is busy with another
// call or when called from inside an item. The first exception of an item is rethrown here. Items run with
// denormal numbers as zero; the caller's own setting is back when this returns.
void parallel_for(std::int64_t count, ItemFunction body);

// Memory of the calling thread, aligned to 64 bytes, kept until the thread ends. Its contents are garbage, and a
// second call invalidates the first.
void* thread_scratch(std::size_t bytes);

}  // namespace fsa::cpu
