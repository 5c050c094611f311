#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

namespace starfire {
namespace {

constexpr int SPINS = 4000;  // some ten microseconds, more than most operations differ in time

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits for a short time in a loop, and then until it is woken.
void wait_while_equal(const std::atomic<uint32_t>& number, uint32_t value) {
  for (int i = 0; i < SPINS; ++i) {
    if (number.load(std::memory_order_acquire) != value) return;
    pause();
  }
  while (number.load() == value) number.wait(value);
}

// Cores that this process may use.
int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  return cores > 0 ? cores : 1;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  for (int64_t i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stopped_ = true;
  started_.fetch_add(1);
  started_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Share share, void* argument) {
  share_ = share, argument_ = argument;
  started_.fetch_add(1);
  started_.notify_all();
  share(argument, 0, threads_);
  barrier();
}

void ThreadPool::barrier() {
  uint32_t before = passed_.load();
  if (arrived_.fetch_add(1) + 1 < threads_) return wait_while_equal(passed_, before);
  arrived_.store(0);
  passed_.fetch_add(1);
  passed_.notify_all();
}

void ThreadPool::work(int64_t thread) {
  for (uint32_t calls = 0;; ++calls) {
    wait_while_equal(started_, calls);
    if (stopped_) return;
    share_(argument_, thread, threads_);
    barrier();
  }
}

void SharedPool::set_threads(int threads) {
  std::lock_guard lock(mutex_);
  if (threads != threads_) pool_.reset();
  threads_ = threads;
}

void SharedPool::call(const std::function<void(Threads&)>& function) {
  OneThread one;
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return function(one);
  int threads = threads_ ? threads_ : available_cores();
  if (threads == 1) return function(one);
  if (process_ != getpid()) {
    static_cast<void>(pool_.release());  // its threads are those of the process before a fork
    process_ = getpid();
  }
  if (!pool_) pool_ = std::make_unique<ThreadPool>(threads);
  function(*pool_);
}

}  // namespace starfire
