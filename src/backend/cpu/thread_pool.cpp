// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "backend/cpu/denormals.h"
#include "core/env.h"
#include "fsa/attention.h"
#include "fsa/error.h"

namespace fsa {
namespace {

constexpr int kMaxThreads = 1024;

// Processors that this process may run on: a container's limit counts, the machine's size does not.
int available_processors() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int initial_threads() {
  const int wanted = env::num_threads();
  return wanted > 0 ? std::min(wanted, kMaxThreads) : std::min(available_processors(), kMaxThreads);
}

std::atomic<int>& thread_setting() {
  static std::atomic<int> threads{initial_threads()};
  return threads;
}

}  // namespace

int num_threads() { return thread_setting().load(std::memory_order_relaxed); }

void set_num_threads(int threads) {
  if (threads < 1 || threads > kMaxThreads)
    throw Error(ErrorCode::invalid_argument, "threads: " + std::to_string(threads) +
                                                 ", but it must be 1 to " + std::to_string(kMaxThreads));
  thread_setting().store(threads, std::memory_order_relaxed);
}

namespace cpu {
namespace {

// A worker that finds no work spins this long before it sleeps: long enough to bridge the phases of one call, short
// enough not to steal time from the next library's threads.
constexpr std::chrono::microseconds kSpin{30};

thread_local bool inside_item = false;

struct Job {
  Job(ItemFunction items, std::int64_t items_count, int workers)
      : body(items), count(items_count), max_workers(workers) {}

  ItemFunction body;
  std::int64_t count;
  int max_workers;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written by the first failing item, read after every worker has left

  void run_items() {
    inside_item = true;
    for (;;) {
      const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= count) break;
      try {
        body(item);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
    inside_item = false;
  }
};

class Pool {
 public:
  // False when another call holds the pool.
  bool try_run(Job& job) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    grow(job.max_workers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      joined_ = 0;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.run_items();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // a worker that wakes up now finds nothing and is not waited for
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(workers_.size()) < workers) {
      try {
        workers_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        return;  // the machine gives no more threads: those that exist do the work
      }
      workers_.back().detach();
    }
  }

  void work() {
    const FlushDenormals flush;
    std::uint64_t seen = 0;
    for (;;) {
      wait_for_change(seen);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      Job* job = job_;
      if (job == nullptr || joined_ >= job->max_workers) continue;
      ++joined_;
      ++active_;
      lock.unlock();
      job->run_items();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  void wait_for_change(std::uint64_t seen) const {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (generation_.load(std::memory_order_acquire) != seen) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    } while (std::chrono::steady_clock::now() < deadline);
  }

  std::mutex caller_;  // held for the length of one parallel_for
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> generation_{0};
  Job* job_ = nullptr;
  int joined_ = 0;
  int active_ = 0;
  std::vector<std::thread> workers_;
};

// Never destroyed: workers sleep in it until the process ends. A forked child has none of the parent's threads and
// perhaps a locked mutex, so it starts with a new pool.
std::atomic<Pool*> pool_pointer{nullptr};

Pool& pool() {
  Pool* current = pool_pointer.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool_pointer.store(nullptr); });
  (void)registered;
  auto fresh = std::make_unique<Pool>();
  if (pool_pointer.compare_exchange_strong(current, fresh.get())) return *fresh.release();
  return *current;
}

struct Scratch {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void parallel_for(std::int64_t count, ItemFunction body, std::int64_t most_threads) {
  if (count <= 0) return;
  const FlushDenormals flush;  // on the caller as on the workers, or results would depend on the thread
  const int workers = static_cast<int>(std::min<std::int64_t>({num_threads(), count, most_threads})) - 1;
  if (workers > 0 && !inside_item) {
    Job job(body, count, workers);
    if (pool().try_run(job)) {
      if (job.failed) std::rethrow_exception(job.error);
      return;
    }
  }
  for (std::int64_t item = 0; item < count; ++item) body(item);
}

void parallel_chains(const std::vector<std::int64_t>& lengths,
                     const std::function<void(std::size_t chain, std::int64_t step)>& body) {
  struct Chain {
    std::int64_t left;
    bool running = false;
  };
  std::vector<Chain> chains;
  for (const std::int64_t length : lengths) chains.push_back({length});
  std::mutex mutex;
  // The chain that has most left of those that no thread is at; chains.size() when there is none.
  const auto longest = [&] {
    std::size_t best = chains.size();
    for (std::size_t i = 0; i < chains.size(); ++i)
      if (!chains[i].running && chains[i].left > 0 &&
          (best == chains.size() || chains[i].left > chains[best].left))
        best = i;
    return best;
  };
  struct Release {  // of a step that throws, too
    std::mutex& mutex;
    Chain& chain;
    ~Release() {
      const std::lock_guard<std::mutex> lock(mutex);
      chain.running = false;
    }
  };
  // A thread that finds no chain leaves: each that is left has a thread, which goes on with it.
  const auto threads = static_cast<std::int64_t>(chains.size());
  parallel_for(threads, [&](std::int64_t) {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      const std::size_t i = longest();
      if (i == chains.size()) return;
      chains[i].running = true;
      const std::int64_t step = lengths[i] - chains[i].left--;
      lock.unlock();
      const Release release{mutex, chains[i]};
      body(i, step);
    }
  });
}

void* thread_scratch(std::size_t bytes) {
  thread_local Scratch scratch;
  if (scratch.bytes < bytes) {
    std::free(scratch.data);
    scratch.bytes = 0;
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(64, rounded);
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.bytes = rounded;
  }
  return scratch.data;
}

}  // namespace cpu
}  // namespace fsa
