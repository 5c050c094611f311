#include "safetensors.h"

#include <string_view>

#include "checks.h"

namespace starfire {
namespace {

constexpr int64_t MAX_HEADER_BYTES = 1 << 20;
constexpr int64_t MAX_BYTES = int64_t{1} << 40;

// A reader of the JSON of headers: objects of strings, integers and lists of integers.
class Json {
 public:
  explicit Json(std::string_view text) : text_(text) {}

  void expect(char character) {
    if (!accept(character)) fail();
  }

  bool accept(char character) {
    skip_spaces();
    if (at_ >= text_.size() || text_[at_] != character) return false;
    ++at_;
    return true;
  }

  std::string string() {
    expect('"');
    std::string result;
    while (at_ < text_.size() && text_[at_] != '"') {
      char character = text_[at_++];
      if (static_cast<unsigned char>(character) < ' ') fail();
      result += character == '\\' ? escaped() : character;
    }
    if (at_ >= text_.size()) fail();
    ++at_;
    return result;
  }

  int64_t integer() {
    skip_spaces();
    size_t first = at_;
    int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      value = 10 * value + (text_[at_] - '0');
      if (value > MAX_BYTES) fail();
    }
    if (at_ == first) fail();
    return value;
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> result;
    expect('[');
    if (accept(']')) return result;
    do result.push_back(integer());
    while (accept(','));
    expect(']');
    return result;
  }

  // Calls `read(key)` for each entry of an object, whose keys differ.
  template <class Read>
  void object(Read read) {
    std::map<std::string, bool> seen;
    expect('{');
    if (accept('}')) return;
    do {
      std::string key = string();
      if (seen[key]) fail();
      seen[key] = true;
      expect(':');
      read(key);
    } while (accept(','));
    expect('}');
  }

  void expect_end() {
    skip_spaces();
    if (at_ != text_.size()) fail();
  }

  [[noreturn]] static void fail() { throw Refused("its header is damaged"); }

 private:
  void skip_spaces() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }

  char escaped() {  // of those that this package writes
    char character = at_ < text_.size() ? text_[at_++] : '\0';
    if (character == 'n') return '\n';
    if (character != '"' && character != '\\') fail();
    return character;
  }

  std::string_view text_;
  size_t at_ = 0;
};

StoredTensor read_tensor(Json& json) {
  StoredTensor tensor{"", {}, -1, -1};
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      tensor.dtype = json.string();
    } else if (key == "shape") {
      tensor.shape = json.integers();
    } else if (key == "data_offsets") {
      std::vector<int64_t> offsets = json.integers();
      if (offsets.size() != 2) Json::fail();
      tensor.begin = offsets[0], tensor.end = offsets[1];
    } else {
      Json::fail();
    }
  });
  if (tensor.begin < 0 || tensor.end < tensor.begin) Json::fail();
  return tensor;
}

}  // namespace

SafetensorsHeader read_safetensors_header(const unsigned char* data, size_t size) {
  int64_t length = 0;
  if (size < 8) throw Refused("it is too short for a safetensors file");
  for (int i = 7; i >= 0; --i) length = length << 8 | data[i];
  if (length < 2 || length > MAX_HEADER_BYTES || length > static_cast<int64_t>(size) - 8)
    throw Refused("it is no complete safetensors file");
  SafetensorsHeader header;
  header.data_at = 8 + length;
  Json json({reinterpret_cast<const char*>(data) + 8, static_cast<size_t>(length)});
  json.object([&](const std::string& name) {
    if (name == "__metadata__")
      json.object([&](const std::string& key) { header.metadata[key] = json.string(); });
    else
      header.tensors[name] = read_tensor(json);
  });
  json.expect_end();
  return header;
}

}  // namespace starfire
