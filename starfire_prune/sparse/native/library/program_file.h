// Files of programs: safetensors files with the tensors `program` and `constants`, see docs/format.md.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace starfire {

constexpr int FILE_VERSION = 1;

// An input or output of a program.
struct Tensor {
  std::string name;
  std::vector<int64_t> shape;  // without the batch
  int64_t floats;              // for each image
};

// The content of a file. Its arrays are within the file's bytes.
struct ProgramFile {
  const unsigned char *program, *constants;
  int64_t program_bytes, constant_bytes;
  std::vector<Tensor> inputs, outputs;
};

// Throws Refused unless these are the bytes of a complete and undamaged file.
ProgramFile read_program_file(const unsigned char* data, size_t size);

uint32_t crc32(const unsigned char* data, size_t size);

}  // namespace starfire
