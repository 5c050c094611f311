#include "program_file.h"

#include <array>
#include <cstdio>
#include <cstdlib>

#include "checks.h"
#include "safetensors.h"

namespace starfire {
namespace {

constexpr char PREFIX[] = "starfire_prune.";
constexpr size_t MAX_TENSORS = 64, MAX_DIMS = 8;

using Tables = std::array<std::array<uint32_t, 256>, 8>;

Tables crc_tables() {
  Tables tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
    tables[0][i] = value;
  }
  for (size_t t = 1; t < 8; ++t)
    for (size_t i = 0; i < 256; ++i)
      tables[t][i] = tables[t - 1][i] >> 8 ^ tables[0][tables[t - 1][i] & 255];
  return tables;
}

std::string hexadecimal(uint32_t value) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

std::string crc_text(const std::string& text) {
  return hexadecimal(crc32(reinterpret_cast<const unsigned char*>(text.data()), text.size()));
}

// The checksum of a header's content, as in serialization/container.py.
std::string header_crc(const SafetensorsHeader& header, const std::string& crc_key) {
  std::string meaning;
  const std::string zero(1, '\0');
  for (const auto& [name, tensor] : header.tensors) {
    std::string shape;
    for (int64_t size : tensor.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    meaning += name + zero + tensor.dtype + zero + shape + "\n";
  }
  for (const auto& [key, value] : header.metadata)
    if (key != crc_key) meaning += key + zero + value + "\n";
  return crc_text(meaning);
}

std::string metadata(const SafetensorsHeader& header, const char* name) {
  auto found = header.metadata.find(PREFIX + std::string(name));
  return found == header.metadata.end() ? "" : found->second;
}

void check_header(const SafetensorsHeader& header) {
  if (metadata(header, "format") != "program")
    throw Refused(
        "it is not a file of a program: `starfire export RUN --format program` writes such files");
  std::string version = metadata(header, "version");
  if (metadata(header, "crc32") != header_crc(header, std::string(PREFIX) + "crc32"))
    throw Refused("its header is damaged: the checksum differs");
  if (version != std::to_string(FILE_VERSION))
    throw Refused("it has version " + version + " of the format, and this library reads version " +
                  std::to_string(FILE_VERSION) + ": update starfire_prune");
}

// A tensor's bytes, whose checksum is compared.
const unsigned char* bytes_of(const SafetensorsHeader& header, const char* name, const char* dtype,
                              int64_t item, const unsigned char* data, int64_t data_bytes,
                              int64_t* length) {
  auto found = header.tensors.find(name);
  if (found == header.tensors.end()) throw Refused(std::string("it has no tensor ") + name);
  const StoredTensor& tensor = found->second;
  bool fits = tensor.dtype == dtype && tensor.shape.size() == 1 && tensor.end <= data_bytes &&
              tensor.end - tensor.begin == tensor.shape[0] * item;
  if (!fits) throw Refused(std::string("its tensor ") + name + " is incomplete");
  *length = tensor.end - tensor.begin;
  const unsigned char* bytes = data + tensor.begin;
  if (hexadecimal(crc32(bytes, *length)) != metadata(header, (name + std::string(".crc32")).c_str()))
    throw Refused(std::string("its tensor ") + name + " is damaged: the checksum differs");
  return bytes;
}

// Descriptions such as "images 3 32 32", separated by semicolons.
std::vector<Tensor> tensors_of(const std::string& text) {
  std::vector<Tensor> tensors;
  const Refused damaged("its inputs or outputs are not described");
  for (size_t at = 0; at < text.size() && tensors.size() <= MAX_TENSORS;) {
    size_t end = text.find(';', at);
    std::string part = text.substr(at, end == std::string::npos ? end : end - at);
    at = end == std::string::npos ? text.size() : end + 1;
    size_t space = part.find(' ');
    Tensor tensor{part.substr(0, space), {}, 1};
    while (space != std::string::npos) {
      size_t next = part.find(' ', space + 1);
      std::string number = part.substr(space + 1, next == std::string::npos ? next : next - space - 1);
      bool digits = !number.empty() && number.size() < 11 &&
                    number.find_first_not_of("0123456789") == std::string::npos;
      int64_t size = digits ? std::atoll(number.c_str()) : 0;
      if (size < 1 || size > MAX_IMAGE || tensor.floats > MAX_IMAGE / size) throw damaged;
      tensor.shape.push_back(size);
      tensor.floats *= size;
      space = next;
    }
    if (tensor.name.empty() || tensor.shape.size() > MAX_DIMS) throw damaged;
    tensors.push_back(tensor);
  }
  if (tensors.empty() || tensors.size() > MAX_TENSORS) throw damaged;
  return tensors;
}

}  // namespace

uint32_t crc32(const unsigned char* data, size_t size) {
  static const Tables tables = crc_tables();
  uint32_t crc = ~uint32_t{0};
  for (; size >= 8; size -= 8, data += 8) {
    uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t{data[3]} << 24);
    crc = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^
          tables[4][low >> 24] ^ tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^
          tables[0][data[7]];
  }
  for (; size > 0; --size, ++data) crc = crc >> 8 ^ tables[0][(crc ^ *data) & 255];
  return ~crc;
}

ProgramFile read_program_file(const unsigned char* data, size_t size) {
  SafetensorsHeader header = read_safetensors_header(data, size);
  check_header(header);
  const unsigned char* tensors = data + header.data_at;
  int64_t bytes = static_cast<int64_t>(size) - header.data_at;
  ProgramFile file{};
  file.program = bytes_of(header, "program", "I64", 8, tensors, bytes, &file.program_bytes);
  file.constants = bytes_of(header, "constants", "U8", 1, tensors, bytes, &file.constant_bytes);
  if (header.tensors.size() != 2 || file.program_bytes + file.constant_bytes != bytes)
    throw Refused("it has more than a program and its constants");
  file.inputs = tensors_of(metadata(header, "inputs"));
  file.outputs = tensors_of(metadata(header, "outputs"));
  return file;
}

}  // namespace starfire
