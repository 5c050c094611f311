// The threads of the library without torch.

#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../threads.h"

namespace starfire {

// Threads that wait for work. The caller of `run` is one of them.
class ThreadPool final : public Threads {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  void run(Share share, void* argument) override;
  void barrier() override;

 private:
  void work(int64_t thread);

  const int64_t threads_;
  Share share_ = nullptr;
  void* argument_ = nullptr;
  bool stopped_ = false;
  std::atomic<uint32_t> started_{0};   // counts the calls of `run`
  std::atomic<uint32_t> passed_{0};    // counts the barriers
  std::atomic<int64_t> arrived_{0};    // threads at the current barrier
  std::vector<std::thread> workers_;
};

// The caller's thread alone.
class OneThread final : public Threads {
 public:
  void run(Share share, void* argument) override { share(argument, 0, 1); }
  void barrier() override {}
};

// A pool for one call at a time, which starts at its first use. Other calls get one thread.
class SharedPool {
 public:
  void set_threads(int threads);
  void call(const std::function<void(Threads&)>& function);

 private:
  std::mutex mutex_;
  int threads_ = 0;  // 0: as many as there are cores
  pid_t process_ = 0;
  std::unique_ptr<ThreadPool> pool_;
};

}  // namespace starfire
