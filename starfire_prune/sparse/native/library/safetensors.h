// The header of a safetensors file.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace starfire {

struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t begin, end;  // bytes after the header
};

struct SafetensorsHeader {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
  int64_t data_at;  // where the header ends
};

// Throws Refused unless the bytes begin with a header of the format that this package writes.
SafetensorsHeader read_safetensors_header(const unsigned char* data, size_t size);

}  // namespace starfire
