// Training of a whole network on the CPU: lay out one workspace, run the two phases of each step in PyTorch's thread
// pool, or a step on a few images right here.
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "training_operands.h"

namespace lenet_fast::cpu {
namespace {

constexpr int64_t kChunk = 1024;  // images of a step between whose phases the dense layers' operands are kept
constexpr int64_t kWorkspaceLimit = int64_t{4} << 30;  // rather an error than a machine out of memory

// Bytes laid out one after another, each part at a multiple of 64.
class Arena {
 public:
  size_t take(int64_t bytes) {
    const size_t at = size_;
    size_ += static_cast<size_t>((bytes + 63) / 64 * 64);
    return at;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

Tensor workspace(const Tensor& like, size_t bytes) {
  if (bytes > static_cast<size_t>(kWorkspaceLimit)) {
    fail("network: needs ", bytes >> 20, " MiB of workspace, more than the ", kWorkspaceLimit >> 20,
         " that the CPU kernels take");
  }
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// `value`, which is at `position` of the argument `name`.
int64_t checked(const char* name, int64_t value, int64_t position, int64_t end) {
  if (value < 0 || value >= end) {
    fail(name, ": expected 0 to ", end - 1, ", got ", value, " at ", position);
  }
  return value;
}

// Reads memory that other threads may write to: what is checked has to be what is used.
int64_t read_once(const int64_t* values, int64_t position) {
  return static_cast<const volatile int64_t*>(values)[position];
}

// Which image and which label is at each position of a run, checked. The kernels read this copy: the caller's tensors
// may change while they run, and an image that does not exist would be read from anywhere.
class Positions {
 public:
  template <typename T>
  Positions(const Training<T>& training, int64_t classes) {
    const int64_t* const order = training.images.order;
    for (int64_t i = 0; i < training.num_images; ++i) {  // those that the order leaves out, too
      checked("labels", read_once(training.labels, i), i, classes);
    }
    labels_.resize(static_cast<size_t>(training.total));
    order_.resize(order != nullptr ? labels_.size() : 0);
    for (int64_t i = 0; i < training.total; ++i) {
      int64_t image = i;
      if (order != nullptr) {
        image = order_[i] = checked("order", read_once(order, i), i, training.num_images);
      }
      labels_[i] = checked("labels", read_once(training.labels, image), image, classes);
    }
  }

  // Null: the images as they lie.
  const int64_t* order() const { return order_.empty() ? nullptr : order_.data(); }
  const int64_t* labels() const { return labels_.data(); }

 private:
  std::vector<int64_t> order_, labels_;
};

// A run's threads and memory.
template <typename T>
class TrainingRun {
 public:
  TrainingRun(Training<T>& training, const Positions& positions, const Tensor& like)
      : t_(training), g_(training.network.geometry), kernel_(kernels().network<T>()) {
    const int64_t largest = std::min(t_.total, t_.batch_size), last = t_.total % t_.batch_size;
    size_t few_bytes = 0;  // fewer images may need more: they are cut into more bands
    for (const int64_t images : {largest, last}) {
      few_bytes = is_few(images) ? std::max(few_bytes, kernel_.few_training_bytes(g_, images)) : few_bytes;
    }
    const int64_t chunk = is_few(largest) ? 0 : std::min(largest, kChunk);
    const int64_t blocks = blocks_of(chunk), padded = blocks * kernel_.lanes;
    threads_ = std::max<int64_t>(1, std::min<int64_t>(blocks, torch::stable::get_num_threads()));
    thread_stride_ = static_cast<int64_t>((kernel_.thread_bytes(g_, true) + 63) / 64 * 64);
    Arena arena;
    const size_t thread_memory = arena.take(chunk > 0 ? threads_ * thread_stride_ : 0);
    const size_t few_memory = arena.take(static_cast<int64_t>(few_bytes));
    const size_t losses = arena.take(threads_ * int64_t{sizeof(double)});
    const size_t correct = arena.take(threads_ * int64_t{sizeof(int64_t)});
    std::vector<size_t> grads;
    for (const auto& one : t_.trained) {
      grads.push_back(arena.take(one.size * int64_t{sizeof(T)}));
    }
    std::array<std::array<size_t, 2>, kMaxDenses> sums{};
    for (int l = 0; l < g_.num_denses; ++l) {
      const int64_t row = (g_.dense[l].in_features + kernel_.lanes - 1) / kernel_.lanes * kernel_.lanes;
      step_.dense_sums[l].grads_stride = padded;
      step_.dense_sums[l].inputs_stride = row;
      sums[l] = {arena.take(g_.dense[l].out_features * padded * int64_t{sizeof(T)}),
                 arena.take(chunk * row * int64_t{sizeof(T)})};
    }
    memory_ = workspace(like, arena.size());
    char* const memory = static_cast<char*>(memory_.mutable_data_ptr());
    for (int l = 0; l < g_.num_denses; ++l) {
      step_.dense_sums[l].grads = reinterpret_cast<T*>(memory + sums[l][0]);
      step_.dense_sums[l].inputs = reinterpret_cast<T*>(memory + sums[l][1]);
    }
    for (size_t i = 0; i < grads.size(); ++i) {
      t_.trained[i].parameter->grad = reinterpret_cast<T*>(memory + grads[i]);
    }
    step_.network = &t_.network;
    step_.images = t_.images;
    step_.images.order = positions.order();
    step_.labels = positions.labels();
    step_.extra_score = t_.extra_score;
    step_.label_smoothing = t_.label_smoothing;
    step_.dropout = t_.dropout;
    few_memory_ = memory + few_memory;
    step_.thread_memory = memory + thread_memory;
    step_.thread_stride = thread_stride_;
    step_.threads = threads_;
    step_.losses = reinterpret_cast<double*>(memory + losses);
    step_.correct = reinterpret_cast<int64_t*>(memory + correct);
    if (chunk > 0) {
      in_parallel([&](int64_t thread) {
        kernel_.prepare(t_.network, t_.images, true, step_.thread_memory + thread * thread_stride_);
      });
    }
  }

  // Step `number`: its mean loss and the number of images right. Where the loss is not finite, nothing is updated.
  std::tuple<double, int64_t> take(int64_t number) {
    const int64_t first = number * t_.batch_size, batch = std::min(t_.batch_size, t_.total - first);
    for (const auto& one : t_.trained) {
      const double taken = one.count != nullptr ? *one.count : -1;
      if (one.count != nullptr && !(taken >= 0)) {  // would make every value NaN
        fail("step_counts: expected at least 0, got ", taken);
      }
      one.parameter->update =
          update_of<T>(t_.settings, one.trains, taken + 1, t_.learning_rates[static_cast<size_t>(number)]);
    }
    step_.dropout.step.index = t_.dropout.step.index + static_cast<uint32_t>(number);
    step_.factor = static_cast<T>(1.0 / static_cast<double>(batch));
    const auto [loss, right] = is_few(batch) ? take_few(first, batch) : take_blocks(first, batch);
    for (const auto& one : t_.trained) {
      if (one.count != nullptr && one.trains && std::isfinite(loss)) {
        *one.count += 1;
      }
    }
    return {loss / static_cast<double>(batch), right};
  }

 private:
  // Half of a block's lanes would be empty, or more.
  bool is_few(int64_t images) const { return images > 0 && 2 * images <= kernel_.lanes; }

  // The batch of a step: summed loss and number right.
  std::tuple<double, int64_t> take_few(int64_t first, int64_t batch) {
    step_.chunk_begin = first;
    step_.chunk_size = batch;
    step_.first_image = 0;
    kernel_.train_few(step_, few_memory_);
    return {step_.losses[0], step_.correct[0]};
  }

  std::tuple<double, int64_t> take_blocks(int64_t first, int64_t batch) {
    std::fill(step_.losses, step_.losses + threads_, 0.0);
    std::fill(step_.correct, step_.correct + threads_, int64_t{0});
    double loss = 0;
    int64_t right = 0;
    for (int64_t at = 0; at < batch && std::isfinite(loss); at += kChunk) {
      step_.chunk_begin = first + at;
      step_.chunk_size = std::min(kChunk, batch - at);
      step_.first_image = at;
      step_.first_chunk = at == 0;
      step_.last_chunk = at + kChunk >= batch;
      const int64_t blocks = blocks_of(step_.chunk_size);
      in_parallel([&](int64_t thread) {
        kernel_.train(step_, kernel_.lanes * (blocks * thread / threads_),
                      std::min(step_.chunk_size, kernel_.lanes * (blocks * (thread + 1) / threads_)), thread);
      });
      loss = 0;
      right = 0;
      for (int64_t thread = 0; thread < threads_; ++thread) {
        loss += step_.losses[thread];
        right += step_.correct[thread];
      }
      if (std::isfinite(loss)) {
        in_parallel([&](int64_t thread) { kernel_.update(step_, thread, threads_); });
      }
    }
    return {loss, right};
  }

  int64_t blocks_of(int64_t images) const { return (images + kernel_.lanes - 1) / kernel_.lanes; }

  template <typename F>
  void in_parallel(const F& f) const {
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        f(thread);
      }
    });
  }

  Training<T>& t_;
  const NetworkGeometry& g_;
  const NetworkKernels<T>& kernel_;
  int64_t threads_, thread_stride_;
  Tensor memory_;
  char* few_memory_;
  TrainingStep<T> step_{};
};

struct Backend {
  static std::tuple<Tensor, Tensor> train(const NetworkOperand& operand, const TrainingArguments& arguments) {
    return with_parameter_type(arguments.parameters, [&]<typename T>(T) {
      Training<T> training(operand, arguments);
      if (training.watch != nullptr) {
        fail("watch: expected none on the CPU, where a call ends with its last step");
      }
      const Positions positions(training, operand.geometry().classes);
      const Tensor& like = arguments.parameters[0];
      Tensor losses = torch::stable::new_empty(like, {training.steps}, ScalarType::Double);
      Tensor correct = torch::stable::new_empty(like, {training.steps}, ScalarType::Long);
      auto* const loss_of = static_cast<double*>(losses.mutable_data_ptr());
      auto* const correct_of = static_cast<int64_t*>(correct.mutable_data_ptr());
      TrainingRun<T> run(training, positions, like);
      int64_t done = 0;
      while (done < training.steps) {
        std::tie(loss_of[done], correct_of[done]) = run.take(done);
        if (!std::isfinite(loss_of[done++])) {
          break;
        }
      }
      if (done == training.steps) {  // a view of all is a twentieth of a small step
        return std::tuple(losses, correct);
      }
      return std::tuple(torch::stable::narrow(losses, 0, 0, done), torch::stable::narrow(correct, 0, 0, done));
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) {
  library.impl("network_train", TORCH_BOX(&network_train<Backend>));
}

}  // namespace
}  // namespace lenet_fast::cpu
