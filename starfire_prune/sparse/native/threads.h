// Where threads come from: torch's OpenMP or those of the library without torch.

#pragma once

#include <cstdint>

namespace starfire {

class Threads {
 public:
  using Share = void (*)(void* argument, int64_t thread, int64_t threads);

  // Calls the function once on each of a number of threads, and returns when all have returned.
  virtual void run(Share share, void* argument) = 0;

  // Called within `run` by each thread: waits until all have called it.
  virtual void barrier() = 0;

 protected:
  ~Threads() = default;
};

}  // namespace starfire
