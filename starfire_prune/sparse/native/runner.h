// A program, read in place, and how it runs. There is no state: programs and constants are only read,
// and each call has its own workspace.

#pragma once

#include <cstdint>

#include "program.h"
#include "threads.h"

namespace starfire {

struct Context;

// Number of fields of an operation after its opcode; -1 if there is no such operation.
int64_t count_fields(int64_t opcode);

// What a call reads and writes.
struct Arguments {
  const float* const* inputs;  // the first image of each
  float* const* outputs;
  const unsigned char* constants;
  int64_t batch;
  float* workspace;
  int64_t isa;
};

class Program {
 public:
  const Header* header;
  const Slot* slots;
  const View* views;
  const int64_t* operations;

  // Sets the pointers to the parts of a program. Returns false unless these are `length` integers of
  // known operations; their fields are not checked.
  bool read(const int64_t* begin, int64_t length);

  // The size of the memory for one call, which `fill_workspace` sets to its first values.
  int64_t workspace_floats(int64_t batch) const;
  void fill_workspace(float* workspace, int64_t batch) const;

  void run(Threads& threads, const Arguments& arguments) const;

 private:
  int64_t slot_floats(int64_t slot, int64_t batch) const;
  void run_share(Threads& all, const Context& context, int64_t isa, int64_t thread,
                 int64_t threads) const;
};

}  // namespace starfire
