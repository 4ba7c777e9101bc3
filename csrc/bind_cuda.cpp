// The CUDA kernels as operators: check, allocate, guard the device, launch on the current stream.
#include "cuda/kernels.h"
#include "current_stream.h"
#include "fused_convolutions.h"
#include "served_device.h"

namespace lenet_fast::cuda {
namespace {

template <typename F>
auto with_storage_type(const Tensor& input, F&& f) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

template <typename S, typename Arguments>
void run(const Arguments& arguments, const Tensor& like, cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(ConvActPool<S>::workspace_bytes(arguments));
  // At least a byte: no workspace means to count only.
  const Tensor workspace = torch::stable::new_empty(like, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
  ConvActPool<S>::run(arguments, workspace.mutable_data_ptr(), stream);
}

// Contiguous operands, as the kernels take them.
struct Contiguous {
  std::optional<Tensor> input, weight, bias, coefficient, subsample_bias;

  explicit Contiguous(const Operands& o)
      : input(contiguous(o.input)),
        weight(contiguous(o.weight)),
        bias(contiguous(o.bias)),
        coefficient(contiguous(o.coefficient)),
        subsample_bias(contiguous(o.subsample_bias)) {}

  static std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? as_operand(tensor, tensor->scalar_type()) : tensor;
  }
};

bool is_dense(const ConvGeometry& g) { return g.num_connections() == g.out_channels * g.in_channels; }

Tensor forward(const Operands& operands, const ConvGeometry& g) {
  const CurrentStream stream(operands.input);
  const Contiguous c(operands);
  const Tensor output = torch::stable::new_empty(*c.input, {g.batch, g.out_channels, g.out_height(), g.out_width()});
  with_storage_type(operands.input, [&]<typename S>(S) {
    run<S>(ConvActPoolForward<S>{g, is_dense(g), data<S>(c.input), data<S>(c.weight), data<S>(c.bias),
                                 data<S>(c.coefficient), data<S>(c.subsample_bias), mutable_data<S>(output)},
           *c.input, stream);
  });
  return output;
}

Gradients backward(const Tensor& grad_output, const Operands& operands, const ConvGeometry& g, const Needs& needs) {
  const CurrentStream stream(operands.input);
  const Contiguous c(operands);
  const std::optional<Tensor> grad = Contiguous::contiguous(grad_output);
  const auto gradient = [&](bool needed, const std::optional<Tensor>& of) {
    return needed && of.has_value() ? torch::stable::new_empty(*of, of->sizes())
                                    : torch::stable::new_empty(*c.input, {0});
  };
  const Gradients grads{gradient(needs.input, c.input), gradient(needs.weight, c.weight), gradient(needs.bias, c.bias),
                        gradient(needs.coefficient, c.coefficient), gradient(needs.subsample_bias, c.subsample_bias)};
  with_storage_type(operands.input, [&]<typename S>(S) {
    const auto target = [&](size_t i) { return grads[i].numel() > 0 ? mutable_data<S>(grads[i]) : nullptr; };
    run<S>(ConvActPoolBackward<S>{g,
                                  is_dense(g),
                                  data<S>(grad),
                                  data<S>(c.input),
                                  data<S>(c.weight),
                                  data<S>(c.bias),
                                  data<S>(c.coefficient),
                                  data<S>(c.subsample_bias),
                                  target(0),
                                  {target(1), target(2), target(3), target(4)}},
           *c.input, stream);
  });
  return grads;
}

struct Backend {
  static constexpr auto forward = &cuda::forward;
  static constexpr auto backward = &cuda::backward;
};

STABLE_TORCH_LIBRARY_IMPL(LENET_FAST_LIBRARY, LENET_FAST_DISPATCH_KEY, library) {
  FusedConvolutions<Backend>::for_each([&]<auto kernel>(const char* name) {
    ServedOrFallback<kernel>::name = name;
    library.impl(name, &ServedOrFallback<kernel>::boxed);
  });
}

}  // namespace
}  // namespace lenet_fast::cuda
