// The functions of starfire.h.

#include "starfire.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "../dispatch.h"
#include "checks.h"
#include "program_file.h"
#include "thread_pool.h"

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

using namespace starfire;

constexpr int64_t MAX_BATCH = 1 << 20;
constexpr Wide MAX_WORKSPACE = Wide{1} << 30;  // floats
constexpr size_t MAX_UNUSED = 16;              // workspaces that are kept
constexpr size_t ALIGNMENT = 64;

thread_local std::string latest_error;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;
using Bytes = std::unique_ptr<unsigned char, Free>;

void* aligned_memory(size_t size) {
  void* memory = std::aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT);
  if (!memory) throw std::bad_alloc();
  return memory;
}

// A file's bytes.
std::vector<unsigned char> read_file(const char* path) {
  errno = 0;
  std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), std::fclose);
  std::vector<unsigned char> content;
  unsigned char part[1 << 16];
  size_t size = 0;
  while (file && (size = std::fread(part, 1, sizeof part, file.get())) > 0)
    content.insert(content.end(), part, part + size);
  if (!file || std::ferror(file.get())) throw Refused(std::strerror(errno));
  return content;
}

}  // namespace

struct starfire_program {
  std::vector<int64_t> numbers;
  Bytes constants;
  Program program{};
  std::vector<Tensor> tensors[2];
  int64_t isa = 0;
  SharedPool pool;
  std::mutex mutex;  // of the workspaces
  std::vector<std::pair<int64_t, Floats>> unused;

  starfire_program(const unsigned char* data, size_t size) {
    ProgramFile file = read_program_file(data, size);
    numbers.resize(file.program_bytes / sizeof(int64_t));
    std::memcpy(numbers.data(), file.program, file.program_bytes);
    constants.reset(static_cast<unsigned char*>(aligned_memory(file.constant_bytes)));
    std::memcpy(constants.get(), file.constants, file.constant_bytes);
    tensors[STARFIRE_INPUT] = file.inputs, tensors[STARFIRE_OUTPUT] = file.outputs;
    if (!program.read(numbers.data(), static_cast<int64_t>(numbers.size())))
      throw Refused("it has operations that this library doesn't know: update starfire_prune");
    std::vector<int64_t> floats[2];
    for (int side : {STARFIRE_INPUT, STARFIRE_OUTPUT})
      for (const Tensor& tensor : tensors[side]) floats[side].push_back(tensor.floats);
    Checker(program, constants.get(), file.constant_bytes, floats[STARFIRE_INPUT],
            floats[STARFIRE_OUTPUT])
        .check();
  }

  const Tensor* tensor(int side, int index) const {
    bool exists = (side == STARFIRE_INPUT || side == STARFIRE_OUTPUT) && index >= 0 &&
                  index < static_cast<int>(tensors[side].size());
    return exists ? &tensors[side][index] : nullptr;
  }

  Floats workspace(int64_t batch) {
    std::lock_guard lock(mutex);
    for (auto each = unused.begin(); each != unused.end(); ++each)
      if (each->first == batch) {
        Floats found = std::move(each->second);
        unused.erase(each);
        return found;
      }
    Wide size = 0;
    for (int64_t i = 0; i < program.header->slots; ++i)
      size += Wide{program.slots[i].image} * batch + program.slots[i].slack + LANES;
    if (size > MAX_WORKSPACE)
      throw Refused("batch (=" + std::to_string(batch) + ") takes more than " +
                    std::to_string(static_cast<int64_t>(MAX_WORKSPACE >> 28)) +
                    " GiB of memory: run smaller batches");
    Floats made(static_cast<float*>(
        aligned_memory(static_cast<size_t>(program.workspace_floats(batch)) * sizeof(float))));
    program.fill_workspace(made.get(), batch);
    return made;
  }

  void release(int64_t batch, Floats memory) {
    std::lock_guard lock(mutex);
    unused.emplace_back(batch, std::move(memory));
    if (unused.size() > MAX_UNUSED) unused.erase(unused.begin());
  }

  void run(int64_t batch, const float* const* inputs, float* const* outputs) {
    require_range(batch, 1, MAX_BATCH, "batch");
    Floats memory = workspace(batch);
    Arguments arguments{inputs, outputs, constants.get(), batch, memory.get(), isa};
    pool.call([&](Threads& threads) { program.run(threads, arguments); });
    release(batch, std::move(memory));
  }
};

namespace {

// Calls a function, whose errors become the text of starfire_error.
template <class Function>
auto guarded(Function function, decltype(function()) failure) -> decltype(function()) {
  latest_error.clear();
  try {
    return function();
  } catch (const std::bad_alloc&) {
    latest_error = "it takes more memory than is free";
  } catch (const std::exception& error) {
    latest_error = error.what();
  }
  return failure;
}

}  // namespace

PUBLIC starfire_program* starfire_load(const void* data, size_t size) {
  auto load = [&] { return new starfire_program(static_cast<const unsigned char*>(data), size); };
  return guarded(load, nullptr);
}

PUBLIC starfire_program* starfire_load_file(const char* path) {
  auto load = [&] {
    std::vector<unsigned char> content = read_file(path);
    return new starfire_program(content.data(), content.size());
  };
  return guarded(load, nullptr);
}

PUBLIC int starfire_count(const starfire_program* program, starfire_side side) {
  bool exists = side == STARFIRE_INPUT || side == STARFIRE_OUTPUT;
  return exists ? static_cast<int>(program->tensors[side].size()) : 0;
}

PUBLIC const char* starfire_name(const starfire_program* program, starfire_side side, int index) {
  const Tensor* tensor = program->tensor(side, index);
  return tensor ? tensor->name.c_str() : nullptr;
}

PUBLIC int starfire_shape(const starfire_program* program, starfire_side side, int index,
                          int64_t sizes[STARFIRE_MAX_DIMS]) {
  const Tensor* tensor = program->tensor(side, index);
  if (!tensor) return -1;
  std::copy(tensor->shape.begin(), tensor->shape.end(), sizes);
  return static_cast<int>(tensor->shape.size());
}

PUBLIC int starfire_run(starfire_program* program, int64_t batch, const float* const* inputs,
                        float* const* outputs) {
  return guarded([&] { return program->run(batch, inputs, outputs), 0; }, -1);
}

PUBLIC int starfire_set_threads(starfire_program* program, int threads) {
  return guarded(
      [&] {
        require_range(threads, 1, 1024, "threads");
        program->pool.set_threads(threads);
        return 0;
      },
      -1);
}

PUBLIC int starfire_set_instructions(starfire_program* program, int bits) {
  return guarded(
      [&] {
        if (bits) require_range(bits, PORTABLE, AVX512, "bits");
        program->isa = bits;
        return 0;
      },
      -1);
}

PUBLIC const char* starfire_error(void) { return latest_error.c_str(); }

PUBLIC void starfire_free(starfire_program* program) { delete program; }
