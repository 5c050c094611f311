// The torch operations of starfire_prune.sparse: they check a program, lay out its workspace and
// run its operations on torch's threads. There is no state: programs and constants are only read,
// and each call has its own workspace.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <cstddef>
#include <cstring>
#include <optional>
#include <string>
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
    case POOL:
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
    case BYTE_LINEAR:
      return static_cast<const ByteLinear*>(operation)->channels;
    default:
      return static_cast<const Linear*>(operation)->channels;
  }
}

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
    default: return -1;
  }
}

// A program tensor, read in place.
struct Program {
  const Header* header;
  const Slot* slots;
  const View* views;
  const int64_t* operations;

  // Raises ValueError unless the tensor is a program.
  explicit Program(const at::Tensor& tensor) {
    bool readable = tensor.is_cpu() && tensor.scalar_type() == at::kLong && tensor.is_contiguous();
    TORCH_CHECK_VALUE(readable && is_valid(tensor.const_data_ptr<int64_t>(), tensor.numel()),
                      "program (= ", tensor.numel(), " numbers of ", tensor.scalar_type(), " on ",
                      tensor.device(), ") is not a program of these kernels, which run on the CPU");
  }

  // Whether `length` integers are a program; sets the pointers to its parts.
  bool is_valid(const int64_t* begin, int64_t length) {
    constexpr int64_t size = sizeof(Header) / sizeof(int64_t);
    header = reinterpret_cast<const Header*>(begin);
    if (length < size || header->magic != MAGIC) return false;
    if (header->slots < 0 || header->slots > length || header->views < 0 || header->views > length)
      return false;
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

  int64_t slot_floats(int64_t slot, int64_t batch) const {
    return ceil_div(slots[slot].image * batch + slots[slot].slack, LANES) * LANES;
  }

  int64_t workspace_floats(int64_t batch) const {
    int64_t floats = 0;
    for (int64_t i = 0; i < header->slots; ++i) floats += slot_floats(i, batch);
    return floats;
  }

  // Whether these tensors have the number and sizes that the program reads and writes.
  bool fits(at::TensorList inputs, at::TensorList outputs) const {
    if (static_cast<int64_t>(inputs.size()) != header->inputs ||
        static_cast<int64_t>(outputs.size()) != header->outputs)
      return false;
    for (int64_t i = 0; i < header->views; ++i) {
      const View& view = views[i];
      if (view.place == WORKSPACE) continue;
      at::TensorList tensors = view.place == INPUT ? inputs : outputs;
      if (view.index < 0 || view.index >= static_cast<int64_t>(tensors.size())) return false;
      at::IntArrayRef shape = tensors[view.index].sizes();
      int64_t floats = 1;
      for (int64_t size : shape.slice(1)) floats *= size;
      if (floats != view.image) return false;
    }
    return true;
  }

  void run(at::TensorList inputs, at::TensorList outputs, const at::Tensor& constants,
           int64_t batch, float* workspace, int64_t isa) const {
    std::vector<float*> slot_bases, bases;
    for (int64_t i = 0; i < header->slots; ++i) {
      slot_bases.push_back(workspace);
      workspace += slot_floats(i, batch);
    }
    for (int64_t i = 0; i < header->views; ++i) {
      const View& view = views[i];
      const void* input = view.place == INPUT ? inputs[view.index].const_data_ptr() : nullptr;
      bases.push_back(view.place == WORKSPACE ? slot_bases[view.index]
                      : view.place == INPUT   ? static_cast<float*>(const_cast<void*>(input))
                                              : outputs[view.index].mutable_data_ptr<float>());
    }
    auto bytes = static_cast<const unsigned char*>(constants.const_data_ptr());
    Context context{views, bases.data(), bytes, batch};
    int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (threads == 1) {
      run_share(context, isa, 0, 1);
      return;
    }
    // One parallel region for all operations: a barrier costs less than the start of a region
#pragma omp parallel num_threads(threads)
    run_share(context, isa, omp_get_thread_num(), omp_get_num_threads());
  }

  // Runs one thread's share of the work items of each operation, in step with the other threads.
  void run_share(const Context& context, int64_t isa, int64_t thread, int64_t threads) const {
    RunItems on_floats = float_kernels(isa), on_bytes = byte_kernels(isa);
    const int64_t* at = operations;
    for (int64_t i = 0; i < header->operations; ++i) {
      int64_t opcode = *at;
      const int64_t* fields = at + 1;
      int64_t items = count_items(context, opcode, fields);
      int64_t begin = items * thread / threads, end = items * (thread + 1) / threads;
      RunItems run_items = opcode < QUANTIZE ? on_floats : on_bytes;
      if (begin < end) run_items(context, opcode, fields, begin, end);
      if (threads > 1) {
#pragma omp barrier
      }
      at = fields + count_fields(opcode);
    }
  }
};

// The memory for one call with a batch of that size, with every slot filled.
at::Tensor new_workspace(const at::Tensor& program_tensor, int64_t batch) {
  Program program(program_tensor);
  at::Tensor workspace = at::empty({program.workspace_floats(batch)}, at::kFloat);
  auto floats = workspace.mutable_data_ptr<float>();
  for (int64_t i = 0; i < program.header->slots; ++i) {
    float value;  // its bits may be anything
    std::memcpy(&value, &program.slots[i].fill, sizeof value);
    for (int64_t end = program.slot_floats(i, batch); end > 0; --end) *floats++ = value;
  }
  return workspace;
}

std::vector<at::Tensor> contiguous_inputs(at::TensorList inputs) {
  TORCH_CHECK_VALUE(!inputs.empty(), "inputs (= []) must have at least one tensor");
  std::vector<at::Tensor> result;
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(
        input.is_cpu() && input.scalar_type() == at::kFloat && input.dim() > 0 &&
            input.size(0) == inputs[0].size(0),
        "inputs must be float32 tensors on the CPU with one batch size, but one has the shape ",
        input.sizes(), ", is ", input.scalar_type(), " on ", input.device());
    result.push_back(input.contiguous());
  }
  return result;
}

// `shapes` has, for each output, its number of dimensions and all sizes but the first.
std::vector<at::Tensor> empty_outputs(int64_t batch, at::IntArrayRef shapes) {
  std::vector<at::Tensor> result;
  while (!shapes.empty()) {
    auto dims = static_cast<size_t>(shapes[0]);
    TORCH_CHECK_VALUE(dims >= 1 && dims <= shapes.size(), "output_shapes are incomplete");
    std::vector<int64_t> shape(shapes.begin(), shapes.begin() + dims);
    shape[0] = batch;
    result.push_back(at::empty(shape, at::kFloat));
    shapes = shapes.slice(dims);
  }
  return result;
}

std::vector<at::Tensor> sparse_inference(at::TensorList inputs, const at::Tensor& program_tensor,
                                         const at::Tensor& constants, at::IntArrayRef output_shapes,
                                         const std::optional<at::Tensor>& given_workspace,
                                         int64_t isa) {
  std::vector<at::Tensor> sources = contiguous_inputs(inputs);
  int64_t batch = inputs[0].size(0);
  std::vector<at::Tensor> outputs = empty_outputs(batch, output_shapes);
  Program program(program_tensor);
  TORCH_CHECK_VALUE(constants.is_cpu() && constants.is_contiguous(), "constants (on ",
                    constants.device(), ") must be contiguous on the CPU");
  if (!program.fits(sources, outputs)) {
    std::vector<at::IntArrayRef> shapes;
    for (const at::Tensor& source : sources) shapes.push_back(source.sizes());
    TORCH_CHECK_VALUE(false, "inputs (of shapes ", shapes, ") do not have the shapes that the ",
                      "model is compiled for; compile it again for other shapes");
  }
  at::Tensor workspace = given_workspace ? *given_workspace : new_workspace(program_tensor, batch);
  TORCH_CHECK_VALUE(workspace.numel() >= program.workspace_floats(batch), "workspace (= ",
                    workspace.numel(), " floats) is too small for ", batch, " images");
  program.run(sources, outputs, constants, batch, workspace.mutable_data_ptr<float>(), isa);
  return outputs;
}

#define ENTRY(expression) {#expression, static_cast<int64_t>(expression)}

// Constants and sizes that program_format.py has too, by the C++ expression.
c10::Dict<std::string, int64_t> program_format() {
  static const std::pair<const char*, int64_t> entries[] = {
      ENTRY(MAGIC), ENTRY(LANES), ENTRY(MAX_TILE), ENTRY(MAX_OUTPUT_TILE), ENTRY(MAX_ROWS),
      ENTRY(MAX_SPILLED), ENTRY(SHARED_OUTPUTS), ENTRY(PLANES), ENTRY(TILES), ENTRY(WORKSPACE), ENTRY(INPUT),
      ENTRY(OUTPUT), ENTRY(COPY), ENTRY(POINTWISE), ENTRY(SPATIAL), ENTRY(POOL), ENTRY(MEAN),
      ENTRY(LINEAR), ENTRY(QUANTIZE), ENTRY(DEQUANTIZE), ENTRY(BYTE_COPY),
      ENTRY(BYTE_POINTWISE), ENTRY(BYTE_SPATIAL), ENTRY(BYTE_POOL), ENTRY(BYTE_LINEAR), ENTRY(BYTE_MEAN),
      ENTRY(FLOATS), ENTRY(CLAMPED_BYTES), ENTRY(SATURATED_BYTES),
      ENTRY(MAXIMUM), ENTRY(SUM), ENTRY(sizeof(Header)), ENTRY(sizeof(Slot)),
      ENTRY(sizeof(View)), ENTRY(sizeof(Copy)), ENTRY(sizeof(Pointwise)), ENTRY(sizeof(Spatial)),
      ENTRY(sizeof(Pool)), ENTRY(sizeof(Mean)), ENTRY(sizeof(Linear)),
      ENTRY(sizeof(Quantize)), ENTRY(sizeof(Dequantize)), ENTRY(sizeof(ByteCopy)),
      ENTRY(sizeof(BytePointwise)), ENTRY(sizeof(ByteSpatial)), ENTRY(sizeof(BytePool)),
      ENTRY(sizeof(ByteLinear)), ENTRY(sizeof(ByteMean)), ENTRY(sizeof(QuadTile)), ENTRY(offsetof(QuadTile, indices)),
      ENTRY(offsetof(QuadTile, weights)), ENTRY(offsetof(QuadTile, counts)),
      ENTRY(offsetof(QuadTile, shared)),
      ENTRY(sizeof(RegisterTile)), ENTRY(offsetof(RegisterTile, channel)),
      ENTRY(offsetof(RegisterTile, count)), ENTRY(offsetof(RegisterTile, start)),
      ENTRY(sizeof(RectangleRun)), ENTRY(offsetof(RectangleRun, rows)),
      ENTRY(offsetof(RectangleRun, columns)), ENTRY(offsetof(RectangleRun, count)),
      ENTRY(offsetof(RectangleRun, offsets)), ENTRY(offsetof(RectangleRun, weights)),
  };
  c10::Dict<std::string, int64_t> result;
  for (const auto& [name, value] : entries) result.insert(name, value);
  return result;
}

}  // namespace

TORCH_LIBRARY(starfire_prune, library) {
  // The workspace is written to, but its content has no meaning before or after a call. It isn't
  // declared as `Tensor(a!)?` because torch can't functionalize an operation that mutates an
  // argument and returns a list.
  library.def(
      "sparse_inference(Tensor[] inputs, Tensor program, Tensor constants, int[] output_shapes, "
      "Tensor? workspace=None, int isa=0) -> Tensor[]");
  library.def("new_workspace(Tensor program, int batch) -> Tensor", new_workspace);
  library.def("program_format() -> Dict(str, int)", program_format);
}

TORCH_LIBRARY_IMPL(starfire_prune, CPU, library) {
  library.impl("sparse_inference", sparse_inference);
}

}  // namespace starfire
