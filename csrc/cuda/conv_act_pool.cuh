// Which kernels serve a call: those of a LeNet layer where it is one, else the ones that take any shape.
#pragma once

#include "gradients.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "tables.cuh"
#include "whole_image_backward.cuh"
#include "workspace.h"

namespace lenet_fast::cuda {
namespace {

// --- the LeNet layers ------------------------------------------------------------------------------------------------

using Lenet5C1 = StaticLayer<1, 28, 28, 6, 5, 2>;
using Lenet5C1Padded = StaticLayer<1, 32, 32, 6, 5, 0>;  // 1998: the images come padded
using Lenet5C3 = StaticLayer<6, 14, 14, 16, 5, 0>;
using Lenet1C1 = StaticLayer<1, 28, 28, 4, 5, 0>;
using Lenet1C3 = StaticLayer<4, 12, 12, 12, 5, 0>;

// A layer, its table, how many maps a thread computes (forward, backward, input gradient), and how many blocks of the
// backward kernel a multiprocessor is to hold.
template <typename LayerT, typename TableT, int ForwardMaps, int BackwardMaps, int InMaps, int BackwardBlocks>
struct Specialisation {
  using Layer = LayerT;
  using Table = TableT;
  static constexpr int forward_maps = ForwardMaps, backward_maps = BackwardMaps, in_maps = InMaps;
  static constexpr int backward_blocks = BackwardBlocks;
};

// Call f(Specialisation{}) for the one that fits; returns whether there was one. float64 has none.
template <typename S, typename F>
bool with_specialisation(const ConvGeometry& g, bool dense, F&& f) {
  const auto attempt = [&]<typename Candidate>(Candidate candidate) {
    const bool fits = Candidate::Layer::matches(g) && Candidate::Table::matches(g, dense);
    if (fits) {
      f(candidate);
    }
    return fits;
  };
  if constexpr (std::is_same_v<S, double>) {
    return false;
  } else {
    return attempt(Specialisation<Lenet5C1, DenseTable<Lenet5C1>, 6, 6, 1, 2>{}) ||
           attempt(Specialisation<Lenet5C1Padded, DenseTable<Lenet5C1Padded>, 6, 6, 1, 2>{}) ||
           attempt(Specialisation<Lenet5C3, DenseTable<Lenet5C3>, 4, 2, 2, 3>{}) ||
           attempt(Specialisation<Lenet5C3, Lenet5C3Table<Lenet5C3>, 2, 2, 2, 3>{}) ||
           attempt(Specialisation<Lenet1C1, DenseTable<Lenet1C1>, 4, 4, 1, 4>{}) ||
           attempt(Specialisation<Lenet1C3, DenseTable<Lenet1C3>, 4, 4, 2, 5>{});
  }
}

// --- any layer -------------------------------------------------------------------------------------------------------

template <typename F>
void with_kernel_size(int64_t kernel_size, F&& f) {
  switch (kernel_size) {
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// Output maps a thread; a double takes two registers.
template <typename T>
inline constexpr int kAnyMaps = 16 / sizeof(T);

// The convolution whose output is the gradient of the input: of the pre-activations' gradient, with turned kernels.
template <int K>
AnyLayer<K> transposed(const AnyLayer<K>& of) {
  AnyLayer<K> layer = of;
  layer.in_channels = of.out_channels;
  layer.out_channels = of.in_channels;
  layer.height = of.conv_height;
  layer.width = of.conv_width;
  layer.padding = of.kernel_size - 1 - of.padding;
  layer.conv_height = of.height;
  layer.conv_width = of.width;
  return layer;
}

// About 256 threads over one image's windows and up to four groups of maps; as many channels at a time as the default
// shared memory holds, and fewer rows of a kernel where not even one channel fits.
template <typename T, int K>
AnyTiling any_tiling(const AnyLayer<K>& layer) {
  AnyTiling tiling;
  tiling.images = 1;
  tiling.groups = std::min(4, divide_up(layer.out_channels, kAnyMaps<T>));
  tiling.window_columns = std::min(16, divide_up(layer.conv_width, 2));
  tiling.window_rows =
      std::min(divide_up(layer.conv_height, 2), std::max(1, 256 / tiling.groups / tiling.window_columns));
  tiling.kernel_rows = layer.kernel_size;
  const auto fits = [&] {
    return TileSizes(tiling, layer.kernel_size, kAnyMaps<T>).template shared_bytes<T>() <= kDefaultSharedBytes;
  };
  tiling.channels = 1;
  while (K == 0 && tiling.kernel_rows > 1 && !fits()) {
    tiling.kernel_rows = divide_up(tiling.kernel_rows, 2);
  }
  if (!fits()) {
    throw std::runtime_error("lenet_fast: weight: kernel size " + std::to_string(layer.kernel_size) +
                             " is too large for the CUDA kernels; use backend='reference'");
  }
  for (tiling.channels = std::min(layer.in_channels, 16); !fits();) {
    tiling.channels = divide_up(tiling.channels, 2);
  }
  return tiling;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename S>
StoreOutput<S, S> output_of(const ConvActPoolForward<S>& p) {
  const ConvGeometry& g = p.geometry;
  return {g.activation,
          g.pool,
          p.coefficient,
          p.subsample_bias,
          static_cast<int>(g.out_channels),
          static_cast<int>(g.out_height()),
          static_cast<int>(g.out_width()),
          p.output};
}

template <int Maps, bool Flipped, typename Arguments>
void launch_convolution(const Arguments& arguments, const char* name, int64_t blocks, cudaStream_t stream) {
  using T = Compute<typename Arguments::Weight>;
  const TileSizes sizes(arguments.tiling, arguments.layer.kernel_size, Maps);
  launch(&convolution<Maps, Flipped, Arguments>, name, blocks, sizes.threads, sizes.template shared_bytes<T>(), stream,
         arguments, int64_t{arguments.tile_rows()} * arguments.tile_columns() * arguments.map_blocks(Maps));
}

// Images a block: enough to fill the warps of a group, once there are images enough for every multiprocessor.
template <typename Layer>
int images_per_block(int64_t batch, int groups) {
  constexpr int windows = Layer::conv_height / 2 * (Layer::conv_width / 2);
  int best = 1;
  double best_use = 0;
  for (int images = 1; groups * round_up(images * windows, 32) <= kMaxThreads; ++images) {
    const double use = static_cast<double>(images * windows) / round_up(images * windows, 32);
    if (use > best_use + 0.01) {
      best = images;
      best_use = use;
    }
  }
  return batch >= int64_t{4} * best * multiprocessors() ? best : 1;
}

template <typename S, typename Special>
void run_special(Special, const ConvActPoolForward<S>& p, cudaStream_t stream) {
  using Layer = typename Special::Layer;
  constexpr int maps = Special::forward_maps;
  using Tiling = WholeImage<Layer, maps>;
  const Tiling tiling{images_per_block<Layer>(p.geometry.batch, Tiling::groups)};
  const Convolution<S, S, Layer, typename Special::Table, Tiling, StoreOutput<S, S>> arguments{
      {},
      {},
      tiling,
      output_of(p),
      p.geometry.batch,
      p.input,
      p.weight,
      p.bias,
      can_vectorise(p.input, Layer::in_channels * Layer::height * Layer::width)};
  constexpr int blocks_per_multiprocessor = 8;
  const int64_t blocks =
      std::min<int64_t>(arguments.image_blocks(), int64_t{blocks_per_multiprocessor} * multiprocessors());
  launch_convolution<maps, false>(arguments, "conv_act_pool", blocks, stream);
}

template <typename S>
void run_any(const ConvActPoolForward<S>& p, const int32_t* indices, cudaStream_t stream) {
  with_kernel_size(p.geometry.kernel_size, [&](auto K) {
    const auto layer = any_layer<K()>(p.geometry);
    const Convolution<S, S, AnyLayer<K()>, AnyTable, AnyTiling, StoreOutput<S, S>> arguments{
        layer,
        {indices, layer.in_channels, false},
        any_tiling<Compute<S>>(layer),
        output_of(p),
        p.geometry.batch,
        p.input,
        p.weight,
        p.bias,
        false};
    launch_convolution<kAnyMaps<Compute<S>>, false>(arguments, "conv_act_pool", arguments.image_blocks(), stream);
  });
}

template <typename S>
size_t forward(const ConvActPoolForward<S>& p, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const bool special = with_specialisation<S>(p.geometry, p.dense, [&](auto specialisation) {
    if (memory != nullptr) {
      run_special<S>(specialisation, p, stream);
    }
  });
  if (!special) {
    int32_t* const indices =
        p.dense ? nullptr : workspace.take<int32_t>(p.geometry.out_channels * p.geometry.in_channels);
    if (memory != nullptr) {
      if (indices != nullptr) {
        upload_indices(p.geometry, indices, stream);
      }
      run_any(p, indices, stream);
    }
  }
  return workspace.used();
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename S>
SumRows<S> sums_of(const ConvActPoolBackward<S>& p, const Compute<S>* rows, int count) {
  const ConvGeometry& g = p.geometry;
  const int maps = static_cast<int>(g.out_channels);
  return {rows,
          count,
          {{p.grads.weight, static_cast<int>(g.num_connections() * g.kernel_size * g.kernel_size)},
           {p.grads.bias, maps},
           {p.grads.coefficient, maps},
           {p.grads.subsample_bias, maps}}};
}

template <typename S>
void launch_sum_rows(const SumRows<S>& arguments, cudaStream_t stream) {
  launch(&sum_rows<S>, "sum_rows", divide_up(arguments.length(), kSumColumns), kSumColumns * kSumGroups,
         sizeof(Compute<S>) * kSumColumns * kSumGroups, stream, arguments);
}

template <typename S>
bool needs_parameters(const ConvActPoolBackward<S>& p) {
  return p.grads.weight != nullptr || p.grads.bias != nullptr || p.grads.coefficient != nullptr ||
         p.grads.subsample_bias != nullptr;
}

template <typename S, typename Special>
void run_special(Special, const ConvActPoolBackward<S>& p, Workspace& workspace, bool only_count, cudaStream_t stream) {
  using Layer = typename Special::Layer;
  using Kernel = WholeImageBackward<S, Layer, typename Special::Table, Special::backward_maps, Special::in_maps,
                                    Special::backward_blocks>;
  const int blocks = static_cast<int>(
      std::min<int64_t>(p.geometry.batch, int64_t{Kernel::blocks_per_multiprocessor} * multiprocessors()));
  const Kernel arguments{p.geometry.activation,
                         p.geometry.pool,
                         p.geometry.batch,
                         p.grad_output,
                         p.input,
                         p.weight,
                         p.bias,
                         p.coefficient,
                         p.subsample_bias,
                         p.grad_input,
                         workspace.take<Compute<S>>(int64_t{blocks} * Kernel::row_length),
                         can_vectorise(p.input, Layer::in_channels * Layer::height * Layer::width)};
  if (!only_count) {
    launch(&whole_image_backward<Kernel>, "whole_image_backward", blocks, Kernel::threads,
           Kernel::shared_bytes(p.grad_input != nullptr), stream, arguments);
    if (needs_parameters(p)) {
      launch_sum_rows(sums_of(p, arguments.rows, blocks), stream);
    }
  }
}

template <typename S>
void run_any(const ConvActPoolBackward<S>& p, Workspace& workspace, bool only_count, cudaStream_t stream) {
  using T = Compute<S>;
  const ConvGeometry& g = p.geometry;
  const int64_t pairs = g.out_channels * g.in_channels;
  // Chunks of images for the weight gradient: enough blocks to fill the device, but not a row of sums an image.
  const int chunks = static_cast<int>(
      std::clamp<int64_t>(int64_t{8} * multiprocessors() / pairs, 1, std::clamp<int64_t>(g.batch, 1, 256)));
  int32_t* const indices = p.dense ? nullptr : workspace.take<int32_t>(pairs);
  T* const grad_conv = workspace.take<T>(g.batch * g.out_channels * g.conv_height() * g.conv_width());
  const int64_t outputs = g.pool == Pool::subsample ? g.batch * g.out_channels * g.out_height() * g.out_width() : 0;
  T* const grad_coefficient = workspace.take<T>(outputs);
  T* const grad_subsample_bias = workspace.take<T>(outputs);
  SumRows<S> sums = sums_of(p, nullptr, chunks);
  const int row_length = sums.length();
  T* const rows = workspace.take<T>(int64_t{chunks} * row_length);
  sums.rows = rows;
  if (only_count) {
    return;
  }
  if (indices != nullptr) {
    upload_indices(g, indices, stream);
  }
  with_kernel_size(g.kernel_size, [&](auto K) {
    using Layer = AnyLayer<K()>;
    const Layer layer = any_layer<K()>(g);
    const Convolution<S, S, Layer, AnyTable, AnyTiling, StoreGradient<S>> gradient{
        layer,
        {indices, layer.in_channels, false},
        any_tiling<T>(layer),
        {g.activation, g.pool, p.grad_output, p.coefficient, p.subsample_bias, layer.out_channels,
         static_cast<int>(g.out_height()), static_cast<int>(g.out_width()), layer.conv_height, layer.conv_width,
         grad_conv, grad_coefficient, grad_subsample_bias},
        g.batch,
        p.input,
        p.weight,
        p.bias,
        false};
    launch_convolution<kAnyMaps<T>, false>(gradient, "conv_act_pool_backward", gradient.image_blocks(), stream);
    if (p.grad_input != nullptr) {
      const Layer turned = transposed<K()>(layer);
      const Convolution<T, S, Layer, AnyTable, AnyTiling, StoreOutput<S, S>> input_gradient{
          turned,
          {indices, layer.in_channels, true},
          any_tiling<T>(turned),
          {Activation::identity, Pool::none, nullptr, nullptr, layer.in_channels, layer.height, layer.width,
           p.grad_input},
          g.batch,
          grad_conv,
          p.weight,
          nullptr,
          false};
      launch_convolution<kAnyMaps<T>, true>(input_gradient, "input_gradient", input_gradient.image_blocks(), stream);
    }
    const size_t scratch = sizeof(T) * (kGradientThreads / 32) * 8;
    if (p.grads.weight != nullptr) {
      launch(&weight_gradient<S, Layer>, "weight_gradient", pairs * chunks, kGradientThreads, scratch, stream,
             {layer, {indices, layer.in_channels, false}, g.batch, chunks, p.input, grad_conv, rows, row_length});
    }
    const auto add_maps = [&](const T* source, int64_t plane, int offset) {
      launch(&map_sums<T>, "map_sums", g.out_channels * chunks, kGradientThreads, scratch, stream,
             {g.batch, layer.out_channels, static_cast<int>(plane), chunks, source, rows + offset, row_length});
    };
    int offset = sums.segments[0].length;
    if (p.grads.bias != nullptr) {
      add_maps(grad_conv, g.conv_height() * g.conv_width(), offset);
    }
    offset += layer.out_channels;
    if (p.grads.coefficient != nullptr) {
      add_maps(grad_coefficient, g.out_height() * g.out_width(), offset);
    }
    offset += layer.out_channels;
    if (p.grads.subsample_bias != nullptr) {
      add_maps(grad_subsample_bias, g.out_height() * g.out_width(), offset);
    }
  });
  if (needs_parameters(p)) {
    launch_sum_rows(sums, stream);
  }
}

template <typename S>
size_t backward(const ConvActPoolBackward<S>& p, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const bool only_count = memory == nullptr;
  const bool special = with_specialisation<S>(p.geometry, p.dense, [&](auto specialisation) {
    run_special<S>(specialisation, p, workspace, only_count, stream);
  });
  if (!special) {
    run_any(p, workspace, only_count, stream);
  }
  return workspace.used();
}

}  // namespace

template <typename S>
size_t ConvActPool<S>::workspace_bytes(const ConvActPoolForward<S>& p) {
  return forward(p, nullptr, nullptr);
}

template <typename S>
size_t ConvActPool<S>::workspace_bytes(const ConvActPoolBackward<S>& p) {
  return backward(p, nullptr, nullptr);
}

template <typename S>
void ConvActPool<S>::run(const ConvActPoolForward<S>& p, void* workspace, cudaStream_t stream) {
  forward(p, workspace, stream);
}

template <typename S>
void ConvActPool<S>::run(const ConvActPoolBackward<S>& p, void* workspace, cudaStream_t stream) {
  backward(p, workspace, stream);
}

}  // namespace lenet_fast::cuda
