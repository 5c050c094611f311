#include "runner.h"

#include <cstring>
#include <vector>

#include "dispatch.h"

namespace starfire {
namespace {

int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Number of independent work items of an operation, which threads may run in any order.
int64_t count_items(const Context& c, int64_t opcode, const int64_t* fields) {
  const void* operation = fields;
  const View& source = c.views[fields[0]];
  const View& destination = c.views[fields[1]];
  switch (opcode) {
    case COPY:
      if (is_of_tiles(c.views, *static_cast<const Copy*>(operation)))
        return c.batch * destination.channels *
               ceil_div(destination.height * destination.width, destination.tile);
      return c.batch * destination.channels * destination.height;
    case POOL:
    case UPSAMPLE:
    case QUANTIZE:
    case DEQUANTIZE:
    case BYTE_COPY:
    case BYTE_POOL:
      return c.batch * destination.channels * destination.height;
    case POINTWISE: {
      auto o = static_cast<const Pointwise*>(operation);
      return c.batch * ceil_div(source.height * source.width, source.tile) *
             ceil_div(o->channels, o->output_tile_size);
    }
    case BYTE_POINTWISE: {
      auto o = static_cast<const BytePointwise*>(operation);
      return c.batch * ceil_div(source.height * source.width, source.tile) *
             ceil_div(o->channels, o->output_tile_size);
    }
    case SPATIAL:
    case BYTE_SPATIAL: {  // which begins with a Spatial
      auto o = static_cast<const Spatial*>(operation);
      int64_t row_tiles = ceil_div(ceil_div(destination.height, o->image_rows), o->rows);
      int64_t column_tiles = o->image_rows > 1 ? 1 : ceil_div(destination.width, LANES);
      return c.batch * row_tiles * column_tiles * ceil_div(o->channels, o->output_tile_size);
    }
    case MEAN:
    case BYTE_MEAN:
      return c.batch * source.channels;
    case CHANNEL_NORM:
      return c.batch * ceil_div(source.height * source.width, LANES);
    case RESPONSE:
      return c.batch;
    case BYTE_LINEAR:
      return static_cast<const ByteLinear*>(operation)->channels;
    default:
      return static_cast<const Linear*>(operation)->channels;
  }
}

}  // namespace

int64_t count_fields(int64_t opcode) {
  switch (opcode) {
    case COPY: return sizeof(Copy) / sizeof(int64_t);
    case POINTWISE: return sizeof(Pointwise) / sizeof(int64_t);
    case SPATIAL: return sizeof(Spatial) / sizeof(int64_t);
    case POOL: return sizeof(Pool) / sizeof(int64_t);
    case MEAN: return sizeof(Mean) / sizeof(int64_t);
    case LINEAR: return sizeof(Linear) / sizeof(int64_t);
    case QUANTIZE: return sizeof(Quantize) / sizeof(int64_t);
    case DEQUANTIZE: return sizeof(Dequantize) / sizeof(int64_t);
    case BYTE_COPY: return sizeof(ByteCopy) / sizeof(int64_t);
    case BYTE_POINTWISE: return sizeof(BytePointwise) / sizeof(int64_t);
    case BYTE_SPATIAL: return sizeof(ByteSpatial) / sizeof(int64_t);
    case BYTE_POOL: return sizeof(BytePool) / sizeof(int64_t);
    case BYTE_LINEAR: return sizeof(ByteLinear) / sizeof(int64_t);
    case BYTE_MEAN: return sizeof(ByteMean) / sizeof(int64_t);
    case UPSAMPLE: return sizeof(Upsample) / sizeof(int64_t);
    case CHANNEL_NORM: return sizeof(ChannelNorm) / sizeof(int64_t);
    case RESPONSE: return sizeof(Response) / sizeof(int64_t);
    default: return -1;
  }
}

bool Program::read(const int64_t* begin, int64_t length) {
  constexpr int64_t size = sizeof(Header) / sizeof(int64_t);
  header = reinterpret_cast<const Header*>(begin);
  if (length < size || header->magic != MAGIC) return false;
  auto outside = [&](int64_t count) { return count < 0 || count > length; };
  if (outside(header->slots) || outside(header->views) || outside(header->operations)) return false;
  slots = reinterpret_cast<const Slot*>(header + 1);
  views = reinterpret_cast<const View*>(slots + header->slots);
  operations = reinterpret_cast<const int64_t*>(views + header->views);
  const int64_t* at = operations;
  for (int64_t i = 0; i < header->operations; ++i) {
    if (at - begin >= length || count_fields(*at) < 0) return false;
    at += 1 + count_fields(*at);
  }
  return at - begin == length;
}

int64_t Program::slot_floats(int64_t slot, int64_t batch) const {
  return ceil_div(slots[slot].image * batch + slots[slot].slack, LANES) * LANES;
}

int64_t Program::workspace_floats(int64_t batch) const {
  int64_t floats = 0;
  for (int64_t i = 0; i < header->slots; ++i) floats += slot_floats(i, batch);
  return floats;
}

void Program::fill_workspace(float* workspace, int64_t batch) const {
  for (int64_t i = 0; i < header->slots; ++i) {
    float value;  // its bits may be anything
    std::memcpy(&value, &slots[i].fill, sizeof value);
    for (int64_t end = slot_floats(i, batch); end > 0; --end) *workspace++ = value;
  }
}

void Program::run(Threads& threads, const Arguments& arguments) const {
  std::vector<float*> slot_bases, bases;
  float* workspace = arguments.workspace;
  for (int64_t i = 0; i < header->slots; ++i) {
    slot_bases.push_back(workspace);
    workspace += slot_floats(i, arguments.batch);
  }
  for (int64_t i = 0; i < header->views; ++i) {
    const View& view = views[i];
    bases.push_back(view.place == WORKSPACE ? slot_bases[view.index]
                    : view.place == INPUT   ? const_cast<float*>(arguments.inputs[view.index])
                                            : arguments.outputs[view.index]);
  }
  const Context context{views, bases.data(), arguments.constants, arguments.batch};
  auto share = [&](int64_t thread, int64_t number) {
    run_share(threads, context, arguments.isa, thread, number);
  };
  threads.run(
      [](void* run, int64_t thread, int64_t number) {
        (*static_cast<decltype(share)*>(run))(thread, number);
      },
      &share);
}

// Runs one thread's share of the work items of each operation, in step with the other threads.
void Program::run_share(Threads& all, const Context& context, int64_t isa, int64_t thread,
                        int64_t threads) const {
  RunItems on_floats = float_kernels(isa), on_bytes = byte_kernels(isa);
  const int64_t* at = operations;
  for (int64_t i = 0; i < header->operations; ++i) {
    int64_t opcode = *at;
    const int64_t* fields = at + 1;
    int64_t items = count_items(context, opcode, fields);
    int64_t begin = items * thread / threads, end = items * (thread + 1) / threads;
    bool is_on_bytes = opcode >= QUANTIZE && opcode <= BYTE_MEAN;
    RunItems run_items = is_on_bytes ? on_bytes : on_floats;
    if (begin < end) run_items(context, opcode, fields, begin, end);
    if (threads > 1) all.barrier();
    at = fields + count_fields(opcode);
  }
}

}  // namespace starfire
