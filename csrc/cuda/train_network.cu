// Whole training steps. One cooperative launch takes all of them: two grid-wide barriers a step, after the images'
// phase and after the update. Where there is no cooperative launch, or none as large as the device, each phase is a
// launch of its own, in a graph of several steps.
//
// Designed for one block of 16 warps a multiprocessor: at most 128 registers a thread; LeNet-5 takes 95 KB of shared
// memory a block.
#include "train_network.h"

#include <cooperative_groups.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "launch_graph.cuh"
#include "network_images.cuh"
#include "network_update.cuh"
#include "tables.cuh"
#include "workspace.h"

namespace lenet_fast::cuda {
namespace {

__device__ inline UpdateMemory& update_memory(const NetworkPlan& n, float* shared) {
  return *reinterpret_cast<UpdateMemory*>(shared + n.update);
}

template <int K, bool HasDropout>
__global__ void __launch_bounds__(kNetworkThreads, 1) train_steps(const __grid_constant__ NetworkPlan n) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  clear_borders(n, shared);
  for (int step = 0; step < n.steps; ++step) {
    const PhaseClock clock(step);
    train_images<K, HasDropout>(n, shared, step);
    cooperative_groups::this_grid().sync();
    clock.stamp(Phase::first_barrier);
    if (!update_parameters(n, update_memory(n, shared), step)) {
      return;  // all blocks
    }
    cooperative_groups::this_grid().sync();
    clock.stamp(Phase::second_barrier);
  }
}

// The phases as launches. A graph repeats its launches with the arguments they had, so which step it is lies in memory;
// each phase reads its own number and writes that of the other, which does not run.
template <int K, bool HasDropout>
__global__ void __launch_bounds__(kNetworkThreads, 1) train_images_phase(const __grid_constant__ NetworkPlan n) {
  const int step = *n.images_step;
  if (talks_to_host()) {
    *n.update_step = step;
  }
  if (*n.stopped != 0) {
    if (talks_to_host()) {
      *n.asked = 1;
    }
    return;
  }
  float* const shared = reinterpret_cast<float*>(shared_memory());
  clear_borders(n, shared);
  train_images<K, HasDropout>(n, shared, step);
}

static __global__ void __launch_bounds__(kNetworkThreads, 1) update_phase(const __grid_constant__ NetworkPlan n) {
  const int step = *n.update_step;
  if (talks_to_host()) {
    *n.images_step = step + 1;
  }
  update_parameters(n, update_memory(n, reinterpret_cast<float*>(shared_memory())), step);
}

struct Results {
  double* losses;
  int64_t* correct;
  int32_t *stopped, *images_step;
  int steps;
};

static __global__ void clear_results(const __grid_constant__ Results a) {
  for (int step = blockIdx.x * blockDim.x + threadIdx.x; step < a.steps; step += gridDim.x * blockDim.x) {
    a.losses[step] = NAN;
    a.correct[step] = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *a.stopped = 0;
    *a.images_step = 0;
  }
}

// After the last step: the optimizer's counts, of the steps taken.
static __global__ void count_steps(const __grid_constant__ NetworkPlan n) {
  const int taken = *n.stopped != 0 ? *n.stopped - 1 : n.steps;
  const int slot = threadIdx.x;
  static_assert(kMaxSlots <= 32);
  if (slot < kMaxSlots && n.slot[slot].trained && n.slot[slot].count != nullptr) {
    *n.slot[slot].count += static_cast<float>(taken);
  }
}

// Hands out shared memory, in floats; every piece is aligned for loads of four.
class SharedLayout {
 public:
  int take(int floats) {
    const int at = used_;
    used_ += round_up(floats, 4);
    return at;
  }
  int used() const { return used_; }

 private:
  int used_ = 0;
};

// A convolution with its planes, whose borders stay from image to image.
ConvPlan conv_plan(const ConvGeometry& g, bool first, SharedLayout& shared) {
  ConvPlan conv{};
  const AnyLayer<0>& layer = conv.layer = any_layer<0>(g);
  conv.activation = g.activation;
  conv.pool = g.pool;
  conv.out_height = static_cast<int>(g.out_height());
  conv.out_width = static_cast<int>(g.out_width());
  const int K = layer.kernel_size;
  conv.num_weights = static_cast<int>(g.num_connections()) * K * K;
  const int rows = round_up(layer.conv_height, 2), columns = round_up(layer.conv_width, 4);
  // A window reads K + 1 rows and columns, the weight gradient up to four columns more.
  conv.stride = round_up(std::max(layer.width + 2 * layer.padding, columns + K), 4) + 4;
  conv.plane = (std::max(layer.height + 2 * layer.padding, rows + K - 1) + 1) * conv.stride;
  conv.pixels = shared.take(layer.in_channels * conv.plane);
  conv.grad_border = first ? 0 : K - 1 - layer.padding;
  const int left = round_up(conv.grad_border, 4);
  // What the last window of the input gradient reads; the first convolution has none.
  const int window_rows = first ? 0 : round_up(layer.height, 2) - 1 + K;
  const int window_columns = first ? 0 : left - conv.grad_border + round_up(layer.width, 2) - 2 + round_up(K + 1, 2);
  conv.grad_stride = round_up(std::max(left + columns, window_columns), 4);
  conv.grad_plane = std::max(conv.grad_border + rows, window_rows) * conv.grad_stride;
  conv.grad_origin = conv.grad_border * conv.grad_stride + left;
  conv.grads = shared.take(layer.out_channels * conv.grad_plane);
  return conv;
}

// What is staged anew in every step.
void place_staged(ConvPlan& conv, bool first, SharedLayout& shared) {
  const AnyLayer<0>& layer = conv.layer;
  const int K = layer.kernel_size;
  conv.weights = shared.take(conv.groups() * kNetworkMaps * layer.in_channels * K * K);
  conv.masks = shared.take(conv.groups() * layer.in_channels);
  const int in_groups = divide_up(layer.in_channels, kNetworkMaps);
  conv.flipped = shared.take(first ? 0 : in_groups * kNetworkMaps * layer.out_channels * K * K);
  conv.in_masks = shared.take(first ? 0 : in_groups * layer.out_channels);
  conv.sums = shared.take(conv.num_sums());
}

// Shapes and places; pointers are filled in later.
NetworkPlan plan_of(const NetworkGeometry& g) {
  NetworkPlan n{};
  SharedLayout shared;
  n.num_convs = g.num_convs;
  n.num_denses = g.num_denses;
  n.classes = static_cast<int>(g.classes);
  n.distances = g.output == Output::distances;
  for (int l = 0; l < g.num_convs; ++l) {
    n.conv[l] = conv_plan(g.conv[l], l == 0, shared);
    n.num_sums += n.conv[l].num_sums();
  }
  n.update = shared.used();
  for (int l = 0; l < g.num_convs; ++l) {
    place_staged(n.conv[l], l == 0, shared);
  }
  for (int l = 0; l < g.num_denses; ++l) {
    DensePlan& dense = n.dense[l];
    dense.in_features = static_cast<int>(g.dense[l].in_features);
    dense.out_features = static_cast<int>(g.dense[l].out_features);
    dense.activation = g.dense[l].activation;
    dense.input = shared.take(dense.in_features);
    dense.grad_input = shared.take(dense.in_features);
    dense.z = shared.take(dense.out_features);
  }
  n.output = shared.take(n.dense[g.num_denses - 1].out_features);
  n.grad_output = shared.take(n.dense[g.num_denses - 1].out_features);
  n.scores = shared.take(n.classes);
  for (int l = 0; l < g.num_convs; ++l) {
    const bool last = l + 1 == g.num_convs;
    const ConvPlan& conv = n.conv[l];
    n.conv[l].grad_output =
        last ? n.dense[0].grad_input : shared.take(conv.layer.out_channels * conv.out_height * conv.out_width);
  }
  n.shared_floats = std::max(shared.used(), n.update + divide_up(static_cast<int>(sizeof(UpdateMemory)), 4));
  return n;
}

size_t shared_bytes(const NetworkPlan& n) { return n.shared_floats * sizeof(float); }

// Pairs of output maps that share an input map, as ConvPlan names them.
std::vector<int32_t> map_pairs(const ConvGeometry& g) {
  std::vector<int32_t> pairs;
  for (int32_t in = 0; in < g.in_channels; ++in) {
    for (int32_t entry = g.connections.column_begin[in]; entry < g.connections.column_begin[in + 1]; entry += 2) {
      const bool has_second = entry + 1 < g.connections.column_begin[in + 1];
      pairs.insert(pairs.end(), {in, g.connections.column_out[entry],
                                 has_second ? g.connections.column_out[entry + 1] : int32_t{-1}});
    }
  }
  return pairs;
}

int64_t steps_of(const TrainingRun& run) { return static_cast<int64_t>(run.learning_rates.size()); }

// Places the run in the workspace, and with `stream` queues the tables' upload; without memory only counts.
size_t place(const TrainingRun& run, NetworkPlan& n, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const NetworkGeometry& g = run.network.geometry;
  const int64_t batch = std::min(run.batch_size, run.total), blocks = multiprocessors();
  for (int l = 0; l < g.num_convs; ++l) {
    const bool dense = g.conv[l].num_connections() == g.conv[l].out_channels * g.conv[l].in_channels;
    const std::vector<int32_t> pairs = map_pairs(g.conv[l]);
    auto* const indices = workspace.take<int32_t>(dense ? 0 : g.conv[l].out_channels * g.conv[l].in_channels);
    auto* const pairs_at = workspace.take<int32_t>(static_cast<int64_t>(pairs.size()));
    n.conv[l].num_pairs = static_cast<int>(pairs.size() / 3);
    n.conv[l].indices = dense ? nullptr : indices;
    n.conv[l].pairs = pairs_at;
    if (memory != nullptr) {
      if (!dense) {
        upload_indices(g.conv[l], indices, stream);
      }
      upload(pairs.data(), static_cast<int64_t>(pairs.size()), pairs_at, stream);
    }
  }
  for (int l = 0; l < g.num_denses; ++l) {
    n.dense[l].inputs = workspace.take<float>(batch * g.dense[l].in_features);
    n.dense[l].grad_outputs = workspace.take<float>(batch * g.dense[l].out_features);
  }
  auto* const rates = workspace.take<double>(steps_of(run));
  n.learning_rates = rates;
  n.block_sums = workspace.take<float>(blocks * n.num_sums);
  n.block_losses = workspace.take<double>(blocks);
  n.block_correct = workspace.take<int32_t>(blocks);
  n.stopped = workspace.take<int32_t>(1);
  n.asked = workspace.take<int32_t>(1);
  n.images_step = workspace.take<int32_t>(1);
  n.update_step = workspace.take<int32_t>(1);
  if (memory != nullptr) {
    upload(run.learning_rates.data(), steps_of(run), rates, stream);
  }
  return workspace.used();
}

NetworkPlan complete_plan(const TrainingRun& run) {
  NetworkPlan n = plan_of(run.network.geometry);
  Network<float> network = run.network;
  const auto slots = network.slots();
  for (int i = 0; i < 4 * n.num_convs + 2 * n.num_denses; ++i) {
    n.slot[i] = {slots[i]->value, slots[i]->first, slots[i]->second, run.counts[i], run.trained[i]};
  }
  n.codes = run.network.codes;
  n.settings = run.settings;
  n.images = run.images.data;
  n.are_bytes = run.images.are_bytes;
  n.image_height = static_cast<int>(run.images.height);
  n.image_width = static_cast<int>(run.images.width);
  n.scale = run.images.scale;
  n.background = run.images.background;
  n.order = run.images.order;
  n.labels = run.labels;
  n.num_images = run.num_images;
  n.total = run.total;
  n.batch_size = run.batch_size;
  n.extra_score = run.extra_score;
  n.label_smoothing = run.label_smoothing;
  n.dropout = run.dropout;
  n.steps = static_cast<int>(steps_of(run));
  n.losses = run.losses;
  n.correct = run.correct;
  n.watch = run.watch;
  return n;
}

// Whether every convolution can take the register tile of kernel size 5: its gradient planes are read in pairs.
bool all_five(const NetworkPlan& n) {
  for (int l = 0; l < n.num_convs; ++l) {
    if (n.conv[l].layer.kernel_size != 5 || n.conv[l].grad_border % 2 != 0) {
      return false;
    }
  }
  return true;
}

// LENET_FAST_COOPERATIVE=0: never, to try the other way on a device that can.
bool may_cooperate() {
  const char* const wish = std::getenv("LENET_FAST_COOPERATIVE");
  return device_attribute(cudaDevAttrCooperativeLaunch) != 0 && (wish == nullptr || std::string_view(wish) != "0");
}

constexpr int kGraphSteps = 16;
// Steps that are queued while the host watches: where more than a thousand launches wait it does, too, and cannot ask
// to stop. The rest is for another call.
constexpr int kQueuedSteps = 32 * kGraphSteps;

// Two launches a step, of `n.steps` steps.
template <int K, bool HasDropout>
void launch_phases(const NetworkPlan& n, cudaStream_t stream) {
  const int64_t blocks = multiprocessors();
  const size_t bytes = shared_bytes(n);
  const auto queue = [&](int steps, cudaStream_t on) {
    for (int step = 0; step < steps; ++step) {
      launch(&train_images_phase<K, HasDropout>, "train_images_phase", blocks, kNetworkThreads, bytes, on, n);
      launch(&update_phase, "update_phase", blocks, kNetworkThreads, bytes, on, n);
    }
  };
  // Not in a graph are those left over, at least one: a kernel is loaded by its first launch, which a capture may
  // forbid.
  const int first = is_capturing(stream) ? n.steps : (n.steps - 1) % kGraphSteps + 1;
  queue(first, stream);
  if (first < n.steps) {
    const LaunchGraph graph([&](cudaStream_t on) { queue(kGraphSteps, on); });
    for (int step = first; step < n.steps; step += kGraphSteps) {
      graph.launch(stream);
    }
  }
}

template <int K, bool HasDropout>
void launch_steps(NetworkPlan n, cudaStream_t stream) {
  launch(&clear_results, "clear_results", 4, 256, 0, stream,
         Results{n.losses, n.correct, n.stopped, n.images_step, n.steps});
  const auto launch_all = [&] {
    return launch_cooperative(&train_steps<K, HasDropout>, "train_steps", multiprocessors(), kNetworkThreads,
                              shared_bytes(n), stream, n);
  };
  if (!may_cooperate() || !launch_all()) {
    n.steps = n.watch != nullptr ? std::min(n.steps, kQueuedSteps) : n.steps;
    launch_phases<K, HasDropout>(n, stream);
  }
  launch(&count_steps, "count_steps", 1, 32, 0, stream, n);
}

}  // namespace

const char* why_unsupported(const NetworkGeometry& g) {
  for (int l = 0; l < g.num_convs; ++l) {
    if (g.conv[l].padding >= g.conv[l].kernel_size) {
      return "a padding as large as the kernel";
    }
    // In 64 bits, before anything is laid out: planes this large fit no multiprocessor anyway.
    if ((g.conv[l].in_channels + g.conv[l].out_channels) * g.conv[l].padded_height() * g.conv[l].padded_width() >
            (1 << 20) ||
        g.conv[l].in_channels * g.conv[l].out_channels * g.conv[l].kernel_size * g.conv[l].kernel_size > (1 << 20)) {
      return "a convolution too large for a multiprocessor's shared memory";
    }
  }
  for (int l = 0; l < g.num_denses; ++l) {
    if (g.dense[l].in_features + g.dense[l].out_features > (1 << 16)) {
      return "a dense layer too wide for a multiprocessor's shared memory";
    }
  }
  if (g.classes > (1 << 16) ||
      shared_bytes(plan_of(g)) > static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))) {
    return "more of an image than a multiprocessor's shared memory holds";
  }
  return nullptr;
}

size_t workspace_bytes(const TrainingRun& run) {
  NetworkPlan n = complete_plan(run);
  return place(run, n, nullptr, nullptr);
}

void train(const TrainingRun& run, void* workspace, cudaStream_t stream) {
  NetworkPlan n = complete_plan(run);
  place(run, n, workspace, stream);
  const auto with_kernel_size = [&](auto has_dropout) {
    all_five(n) ? launch_steps<5, has_dropout.value>(n, stream) : launch_steps<0, has_dropout.value>(n, stream);
  };
  run.dropout.is_active() ? with_kernel_size(std::true_type{}) : with_kernel_size(std::false_type{});
}

}  // namespace lenet_fast::cuda

#ifdef LENET_FAST_CLOCKS
// For benchmarks/phase_clocks.py: what phase_clocks holds, and its values.
extern "C" {

__attribute__((visibility("default"))) const char* lenet_fast_phase_names() {
#define LENET_FAST_PHASE(name) #name " "
  return LENET_FAST_PHASES(LENET_FAST_PHASE);
#undef LENET_FAST_PHASE
}

__attribute__((visibility("default"))) void lenet_fast_phase_shape(int64_t* shape) {
  using namespace lenet_fast::cuda;
  const int64_t sizes[] = {kClockBlocks, kClockSteps, kClockRounds, kPhases, kClockLayers};
  std::copy(std::begin(sizes), std::end(sizes), shape);
}

// Copies the clocks to `target` and clears them. Returns CUDA's error code.
__attribute__((visibility("default"))) int lenet_fast_take_phase_clocks(long long* target) {
  using lenet_fast::cuda::phase_clocks;
  const std::vector<char> zeros(sizeof phase_clocks);
  const cudaError_t error = cudaMemcpyFromSymbol(target, phase_clocks, sizeof phase_clocks);
  return error != cudaSuccess ? error : cudaMemcpyToSymbol(phase_clocks, zeros.data(), sizeof phase_clocks);
}

}  // extern "C"
#endif
