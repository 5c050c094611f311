// The torch operations of starfire_prune.sparse: they compare tensors with a program, and run it on
// torch's threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "runner.h"

namespace starfire {
namespace {

// torch's threads, in one parallel region for all operations: a barrier costs less than the start of
// a region.
class TorchThreads final : public Threads {
 public:
  void run(Share share, void* argument) override {
    int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (threads == 1) return share(argument, 0, 1);
#pragma omp parallel num_threads(threads)
    share(argument, omp_get_thread_num(), omp_get_num_threads());
  }

  void barrier() override {
#pragma omp barrier
  }
};

Program read_program(const at::Tensor& tensor) {
  Program program{};
  bool readable = tensor.is_cpu() && tensor.scalar_type() == at::kLong && tensor.is_contiguous();
  TORCH_CHECK_VALUE(readable && program.read(tensor.const_data_ptr<int64_t>(), tensor.numel()),
                    "program (= ", tensor.numel(), " numbers of ", tensor.scalar_type(), " on ",
                    tensor.device(), ") is not a program of these kernels, which run on the CPU");
  return program;
}

// Whether these tensors have the number and sizes that the program reads and writes.
bool fits(const Program& program, at::TensorList inputs, at::TensorList outputs) {
  if (static_cast<int64_t>(inputs.size()) != program.header->inputs ||
      static_cast<int64_t>(outputs.size()) != program.header->outputs)
    return false;
  for (int64_t i = 0; i < program.header->views; ++i) {
    const View& view = program.views[i];
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

// The memory for one call with a batch of that size, with every slot filled.
at::Tensor new_workspace(const at::Tensor& program_tensor, int64_t batch) {
  Program program = read_program(program_tensor);
  at::Tensor workspace = at::empty({program.workspace_floats(batch)}, at::kFloat);
  program.fill_workspace(workspace.mutable_data_ptr<float>(), batch);
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
  Program program = read_program(program_tensor);
  TORCH_CHECK_VALUE(constants.is_cpu() && constants.is_contiguous(), "constants (on ",
                    constants.device(), ") must be contiguous on the CPU");
  if (!fits(program, sources, outputs)) {
    std::vector<at::IntArrayRef> shapes;
    for (const at::Tensor& source : sources) shapes.push_back(source.sizes());
    TORCH_CHECK_VALUE(false, "inputs (of shapes ", shapes, ") do not have the shapes that the ",
                      "model is compiled for; compile it again for other shapes");
  }
  at::Tensor workspace = given_workspace ? *given_workspace : new_workspace(program_tensor, batch);
  TORCH_CHECK_VALUE(workspace.numel() >= program.workspace_floats(batch), "workspace (= ",
                    workspace.numel(), " floats) is too small for ", batch, " images");
  std::vector<const float*> from;
  std::vector<float*> to;
  for (const at::Tensor& source : sources) from.push_back(source.const_data_ptr<float>());
  for (const at::Tensor& output : outputs) to.push_back(output.mutable_data_ptr<float>());
  auto bytes = static_cast<const unsigned char*>(constants.const_data_ptr());
  TorchThreads threads;
  program.run(threads, {from.data(), to.data(), bytes, batch, workspace.mutable_data_ptr<float>(), isa});
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
      ENTRY(UPSAMPLE), ENTRY(CHANNEL_NORM), ENTRY(RESPONSE), ENTRY(AVERAGE), ENTRY(EUCLIDEAN),
      ENTRY(sizeof(Upsample)), ENTRY(sizeof(ChannelNorm)), ENTRY(sizeof(Response)),
      ENTRY(FLOATS), ENTRY(CLAMPED_BYTES), ENTRY(SATURATED_BYTES),
      ENTRY(NO_ACTIVATION), ENTRY(SILU), ENTRY(HARD_SWISH), ENTRY(HARD_SIGMOID), ENTRY(SIGMOID),
      ENTRY(GELU), ENTRY(GELU_TANH), ENTRY(MAXIMUM), ENTRY(SUM), ENTRY(sizeof(Header)), ENTRY(sizeof(Slot)),
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
