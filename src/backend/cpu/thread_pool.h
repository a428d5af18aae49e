// SPDX-License-Identifier: Apache-2.0
// Worker threads of the CPU backends. Which thread computes which item never changes a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

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

// Calls body(item) for every item in [0, count), begun in ascending order, on up to num_threads() threads, the
// caller among them, and on `most_threads` at most. Returns when all are done. Runs on the caller alone when the
// pool is busy with another call or when called from inside an item. The first exception of an item is rethrown
// here; an item that was begun is run all the same. Items run with denormal numbers as zero; the caller's own
// setting is back when this returns.
void parallel_for(std::int64_t count, ItemFunction body, std::int64_t most_threads = INT64_MAX);

// Calls body(chain, step) for every step in [0, lengths[chain]) of every chain. The steps of a chain run one after the
// other, on any thread, and a thread turns to the chain that has most steps left: threads share the work by steps where a
// sum needs its terms in order.
void parallel_chains(const std::vector<std::int64_t>& lengths,
                     const std::function<void(std::size_t chain, std::int64_t step)>& body);

// Memory of the calling thread, aligned to 64 bytes, kept until the thread ends. Its contents are garbage, and a
// second call invalidates the first.
void* thread_scratch(std::size_t bytes);

}  // namespace fsa::cpu
