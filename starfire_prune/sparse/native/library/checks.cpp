#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace starfire {

// ---------------------------------------------------------------------------------------------
// Views
// ---------------------------------------------------------------------------------------------

Wide pixels(const View& view) { return Wide{view.height} * view.width; }

Wide channel_lanes(const View& view) {
  return view.kind == TILES ? Wide{view.tile} * ceil_div(pixels(view), view.tile)
                            : Wide{view.phases_h} * view.phases_w * view.plane;
}

Wide channel_at(const View& view, int64_t channel) {
  Wide size = view.kind == TILES ? Wide{view.tile} : channel_lanes(view);
  return (Wide{view.first} + channel) * size;
}

// One past the last pixel of a view's last channel.
static Wide end_of_pixels(const View& view) {
  Wide last = channel_at(view, view.channels - 1);
  if (view.kind == TILES) {
    Wide tiles = ceil_div(pixels(view), view.tile);
    return last + (tiles - 1) * view.total * view.tile + view.tile;
  }
  return last + channel_lanes(view);
}

void require_range(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value > high)
    throw Refused(std::string(name) + " (=" + std::to_string(value) + ") must be from " +
                  std::to_string(low) + " to " + std::to_string(high));
}

void require_small_number(int64_t bits, const char* name) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  if (!(std::fabs(value) <= 255.0f)) throw Refused(std::string(name) + " is not that of a byte");
}

void require_same_size(const View& one, const View& other) {
  require(one.height == other.height && one.width == other.width,
          "source and destination have images of different sizes");
}

void require_one_pixel(const View& view) {
  require(view.height == 1 && view.width == 1, "a view must have one pixel per channel");
}

void require_segments(const View& destination, Wide rows, int64_t row_pixels) {
  Wide per_row = destination.kind == TILES ? row_pixels / LANES + 2 : Wide{destination.phases_w};
  require(rows * per_row <= MAX_SEGMENTS, "the destination has too many phases");
}

static void check_place(const View& view, const Header& header) {
  require_range(view.kind, PLANES, TILES, "kind");
  require_range(view.place, WORKSPACE, OUTPUT, "place");
  int64_t places[] = {header.slots, header.inputs, header.outputs};
  require_range(view.index, 0, places[view.place] - 1, "index");
  if (view.place == WORKSPACE) return;
  bool is_plain = view.kind == PLANES && view.phases_h == 1 && view.phases_w == 1 &&
                  view.top == 0 && view.left == 0 && view.row == view.width &&
                  view.plane == pixels(view);
  require(is_plain, "inputs and outputs must be in row-major order");
}

static void check_layout(const View& view) {
  if (view.kind == TILES) {
    require(view.tile > 0 && view.tile % LANES == 0 && view.tile <= MAX_TILE, "the tile's size");
    return;
  }
  require_range(view.phases_h, 1, MAX_SEGMENTS, "phases_h");
  require_range(view.phases_w, 1, MAX_SEGMENTS, "phases_w");
  require_range(view.row, 1, MAX_FIELD, "row");
  require_range(view.plane, 1, MAX_FIELD, "plane");
  require_range(view.top, 0, MAX_FIELD, "top");
  require_range(view.left, 0, MAX_FIELD, "left");
  Wide last_row = (view.top + view.height - 1) / view.phases_h;
  Wide last_column = (view.left + view.width - 1) / view.phases_w;
  require(last_column < view.row, "rows overlap");
  require(last_row * view.row + last_column < view.plane, "planes overlap");
}

void Checker::check_view(const View& view) const {
  for (int64_t size : {view.channels, view.total, view.height, view.width})
    require_range(size, 1, MAX_FIELD, "the size of a view");
  require_range(view.width, 1, MAX_ROW, "width");
  require_range(view.first, 0, MAX_FIELD, "first");
  require(view.first + view.channels <= view.total, "channels lie outside of the total");
  check_place(view, *program_.header);
  check_layout(view);
  require_range(view.image, 1, MAX_IMAGE, "image");
  require(channel_lanes(view) <= MAX_IMAGE && channel_lanes(view) * view.total == view.image,
          "its image has another size than its channels");
  int64_t memory = view.place == WORKSPACE ? program_.slots[view.index].image
                   : view.place == INPUT   ? input_floats_[view.index]
                                           : output_floats_[view.index];
  bool fits = view.place == WORKSPACE ? view.image <= memory : view.image == memory;
  require(fits, "its image does not fit in its memory");
}

// ---------------------------------------------------------------------------------------------
// What operations read and write
// ---------------------------------------------------------------------------------------------

Checker::Checker(const Program& program, const unsigned char* constants, int64_t constant_bytes,
                 std::vector<int64_t> input_floats, std::vector<int64_t> output_floats)
    : program_(program),
      constants_(constants),
      constant_bytes_(constant_bytes),
      input_floats_(std::move(input_floats)),
      output_floats_(std::move(output_floats)) {}

const View& Checker::view(int64_t index) const {
  require_range(index, 0, program_.header->views - 1, "the number of a view");
  return program_.views[index];
}

const int32_t* Checker::starts(int64_t at, Wide lists, const char* what) {
  const int32_t* result = array<int32_t>(at, lists + 1, what);
  count_entries((lists + 1) * Wide{sizeof(int32_t)});
  require(result[0] >= 0, "a list starts before its array");
  for (int64_t i = 0; i < lists; ++i)
    require(result[i] <= result[i + 1], "a list ends before its start");
  return result;
}

void Checker::count_entries(Wide bytes) {
  entries_ += bytes;
  require(entries_ <= constant_bytes_, "lists overlap");
}

// Lanes of an image that may be loaded: those of the next one may, too, and the slack.
Wide Checker::room(const View& view) const {
  if (view.place != WORKSPACE) return view.image;
  const Slot& slot = program_.slots[view.index];
  return Wide{slot.image} + slot.slack;
}

void Checker::reads_until(int64_t index, Wide end) const {
  const View& source = view(index);
  require(source.place != WORKSPACE || written_slots_[source.index],
          "it reads memory that nothing was written to");
  require(source.place != OUTPUT, "it reads an output");
  require(end <= room(source), "it reads outside of its source");
}

void Checker::reads_rows(int64_t index, int64_t past) const {
  const View& source = view(index);
  // Rows of inputs are copied before more lanes than theirs are loaded
  reads_until(index, end_of_pixels(source) + (source.place == WORKSPACE ? past : 0));
}

bool Checker::overlap(const View& one, const View& other) const {
  if (one.place != other.place || one.index != other.index) return false;
  bool parts = one.kind == other.kind && one.image == other.image && one.total == other.total &&
               channel_lanes(one) == channel_lanes(other);
  return !parts || (one.first < other.first + other.channels &&
                    other.first < one.first + one.channels);
}

void Checker::writes(int64_t index, std::initializer_list<int64_t> sources) {
  const View& destination = view(index);
  require(destination.place != INPUT, "it writes to an input");
  for (int64_t source : sources)
    require(source < 0 || !overlap(destination, view(source)), "it writes to what it reads");
  if (destination.place == WORKSPACE)
    written_slots_[destination.index] = true;
  else
    written_outputs_.push_back(&destination);
}

void Checker::reads_like(int64_t operand, int64_t destination, bool anywhere) const {
  if (operand < 0) return;
  const View &one = view(operand), &other = view(destination);
  bool same = one.kind == other.kind && one.channels == other.channels &&
              one.height == other.height && one.width == other.width;
  if (one.kind == TILES)
    same = same && one.tile == other.tile && (anywhere || one.total == other.total);
  else
    same = same && one.phases_h == other.phases_h && one.phases_w == other.phases_w &&
           one.top == other.top && one.left == other.left && one.row == other.row &&
           one.plane == other.plane;
  require(same, "an operand has another layout than the destination");
  reads_until(operand, end_of_pixels(one) + LANES - 1);
}

void Checker::activates(int64_t activation, int64_t destination) const {
  require_range(activation, NO_ACTIVATION, GELU_TANH, "activation");
  if (activation == NO_ACTIVATION) return;
  const View& results = view(destination);
  require(results.place == WORKSPACE, "only results in the workspace can be activated");
  require(end_of_pixels(results) + LANES - 1 <= room(results), "it reads after its destination");
}

// ---------------------------------------------------------------------------------------------
// The program
// ---------------------------------------------------------------------------------------------

void Checker::check_slots() const {
  std::vector<int64_t> largest(program_.header->slots, 0);
  for (int64_t i = 0; i < program_.header->views; ++i) {
    const View& view = program_.views[i];
    if (view.place == WORKSPACE) largest[view.index] = std::max(largest[view.index], view.image);
  }
  for (int64_t i = 0; i < program_.header->slots; ++i) {
    const Slot& slot = program_.slots[i];
    require(slot.image == largest[i], "a slot has another size than its views");
    require_range(slot.slack, 0, MAX_SLACK, "slack");
  }
}

void Checker::check_outputs() {
  for (int64_t i = 0; i < program_.header->outputs; ++i) {
    std::vector<std::pair<int64_t, int64_t>> parts;
    int64_t end = 0, total = 0;
    for (const View* view : written_outputs_)
      if (view->index == i) {
        parts.emplace_back(view->first, view->first + view->channels);
        total = total ? std::min(total, view->total) : view->total;
        require(view->total == total, "an output is written in different shapes");
      }
    std::sort(parts.begin(), parts.end());
    for (const auto& [first, last] : parts)
      if (first <= end) end = std::max(end, last);
    require(total > 0 && end == total, "an output is not written completely");
  }
}

void Checker::check_operation(int64_t opcode, const int64_t* fields) {
  if (opcode >= QUANTIZE && opcode <= BYTE_MEAN)
    check_byte_operation(*this, opcode, fields);
  else
    check_float_operation(*this, opcode, fields);
}

void Checker::check() {
  const Header& header = *program_.header;
  require(header.inputs == static_cast<int64_t>(input_floats_.size()) &&
              header.outputs == static_cast<int64_t>(output_floats_.size()),
          "it has another number of inputs or outputs than the file says");
  for (int64_t i = 0; i < header.views; ++i) try {
      check_view(program_.views[i]);
    } catch (const Refused& refused) {
      throw Refused("view " + std::to_string(i) + ": " + refused.what());
    }
  check_slots();
  written_slots_.assign(header.slots, false);
  const int64_t* at = program_.operations;
  for (int64_t i = 0; i < header.operations; ++i) try {
      check_operation(*at, at + 1);
      at += 1 + count_fields(*at);
    } catch (const Refused& refused) {
      throw Refused("operation " + std::to_string(i) + " (opcode " + std::to_string(*at) +
                    "): " + refused.what());
    }
  check_outputs();
}

}  // namespace starfire
