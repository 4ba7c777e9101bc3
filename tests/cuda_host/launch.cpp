// Runs a launch on the host: blocks one after another, the threads of a block as fibers. See README.md.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cooperative_groups.h"
#include "cuda_runtime.h"
#include "fiber.h"
#include "position.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

constexpr size_t shared_limit = size_t{227} << 10;  // a block's, of an H100
constexpr size_t shared_default_limit = size_t{48} << 10;
constexpr size_t shared_per_multiprocessor = size_t{228} << 10;
constexpr size_t shared_reserved = size_t{1} << 10;  // by the system, of every block
constexpr size_t threads_per_multiprocessor = 2048;

// All `extern __shared__` arrays: the linker gives their names to this one (build.py).
extern "C" {
alignas(16) extern unsigned char cuda_host_shared_memory[shared_limit];
alignas(16) unsigned char cuda_host_shared_memory[shared_limit];
}
unsigned char* const shared_memory = cuda_host_shared_memory;

namespace {

std::string text(const char* format, auto... values) {
  char buffer[512];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

// What a kernel did that no GPU would forgive; ends the launch.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which independent things run: CUDA_HOST_ORDER=forward (default), reverse, or the seed of a random one.
class Order {
 public:
  Order() {
    const char* choice = std::getenv("CUDA_HOST_ORDER");
    name_ = choice != nullptr ? choice : "forward";
    if (name_ != "forward" && name_ != "reverse") {
      char* end;
      generator_.seed(static_cast<unsigned>(std::strtoul(name_.c_str(), &end, 10)));
      if (name_.empty() || *end != '\0') {
        throw Fault("CUDA_HOST_ORDER: expected forward, reverse or a seed, got '" + name_ + "'");
      }
    }
  }

  // 0 .. count-1, a new order at every call if it is random.
  std::vector<size_t> of(size_t count) {
    std::vector<size_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), size_t{0});
    if (name_ == "reverse") {
      std::reverse(numbers.begin(), numbers.end());
    } else if (name_ != "forward") {
      std::shuffle(numbers.begin(), numbers.end(), generator_);
    }
    return numbers;
  }

 private:
  std::string name_;
  std::mt19937 generator_;
};

enum class State { ready, at_block_barrier, at_grid_barrier, in_warp, finished };

// __syncwarp or a shuffle, as one lane calls it.
struct WarpOperation {
  const char* name;
  unsigned mask;
  size_t size;      // of the value, 0 for none
  unsigned source;  // lane
  unsigned char value[8];
};

struct Thread {
  Fiber* fiber;
  uint3 index;
  Moment moment;
  State state = State::ready;
  WarpOperation operation;
  std::string fault;
};

Thread* current = nullptr;

void wait(State state) {
  current->state = state;
  Fiber::yield();
}

std::string coordinates(uint3 index) { return text("(%u,%u,%u)", index.x, index.y, index.z); }

uint3 position(size_t number, dim3 size) {
  return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

size_t volume(dim3 size) { return size_t{size.x} * size.y * size.z; }

class Block {
 public:
  Block(size_t number, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body)
      : index_(position(number, gridDim)), shared_(shared_bytes, 0xff), threads_(volume(blockDim)) {  // NaN in any type
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].fiber = fibers[i];
      threads_[i].index = position(i, blockDim);
      threads_[i].moment = {static_cast<uint32_t>(number), static_cast<uint32_t>(i), 0, 0};
      fibers[i]->start(body);
    }
  }

  // Until every thread has returned or waits for the grid; which of the two.
  State run(Order& order) {
    blockIdx = index_;
    std::copy(shared_.begin(), shared_.end(), cuda_host_shared_memory);
    while (true) {
      for (const size_t warp : order.of((threads_.size() + warpSize - 1) / warpSize)) {
        run_warp(order, warp);
      }
      const State state = threads_[0].state;
      for (const Thread& thread : threads_) {
        if (thread.state != state || state == State::in_warp) {
          throw Fault(divergence());
        }
      }
      if (state != State::at_block_barrier) {
        std::copy_n(cuda_host_shared_memory, shared_.size(), shared_.begin());
        return state;
      }
      release();
    }
  }

  void release() {
    for (Thread& thread : threads_) {
      thread.state = State::ready;
      ++thread.moment.phase;
    }
  }

  std::string name() const { return "block " + coordinates(index_); }

 private:
  void run_warp(Order& order, size_t warp) {
    Thread* const lanes = &threads_[warp * warpSize];
    const size_t count = std::min<size_t>(warpSize, threads_.size() - warp * warpSize);
    do {
      for (const size_t lane : order.of(count)) {
        if (lanes[lane].state == State::ready) {
          resume(lanes[lane]);
        }
      }
    } while (finish_warp_operation(lanes, count));
  }

  void resume(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    thread.fiber->resume();
    current = nullptr;
    if (thread.fiber->finished()) {
      thread.state = State::finished;
    }
    if (!thread.fault.empty()) {
      throw Fault(name() + ", thread " + coordinates(thread.index) + ": " + thread.fault);
    }
  }

  // Carry out an operation for which all lanes that it names, but for those that have returned, have come.
  bool finish_warp_operation(Thread* lanes, size_t count) {
    for (size_t first = 0; first < count; ++first) {
      if (lanes[first].state != State::in_warp) {
        continue;
      }
      const WarpOperation& operation = lanes[first].operation;
      std::vector<Thread*> members;
      bool complete = true;
      for (size_t lane = 0; lane < count; ++lane) {
        if ((operation.mask >> lane & 1) != 0 && lanes[lane].state != State::finished) {
          members.push_back(&lanes[lane]);
          complete = complete && lanes[lane].state == State::in_warp;
        }
      }
      if (complete) {
        exchange(lanes, members);
        return true;
      }
    }
    return false;
  }

  void exchange(Thread* lanes, const std::vector<Thread*>& members) {
    const WarpOperation& first = members.front()->operation;
    std::vector<std::array<unsigned char, 8>> received;
    for (const Thread* member : members) {
      const WarpOperation& operation = member->operation;
      const std::string who = name() + ", thread " + coordinates(member->index) + ": ";
      if (std::strcmp(operation.name, first.name) != 0 || operation.mask != first.mask ||
          operation.size != first.size) {
        throw Fault(
            who +
            text("%s of %zu bytes with mask 0x%08x, while thread ", operation.name, operation.size, operation.mask) +
            coordinates(members.front()->index) +
            text(" of the warp calls %s of %zu bytes with mask 0x%08x", first.name, first.size, first.mask));
      }
      const auto source = std::find(members.begin(), members.end(), lanes + operation.source);
      if (operation.size > 0 && source == members.end()) {
        throw Fault(who + text("%s reads lane %u, which takes no part", operation.name, operation.source));
      }
      std::memcpy(received.emplace_back().data(), operation.size > 0 ? (*source)->operation.value : operation.value, 8);
    }
    for (size_t i = 0; i < members.size(); ++i) {
      std::memcpy(members[i]->operation.value, received[i].data(), 8);
      members[i]->state = State::ready;
      ++members[i]->moment.step;
    }
  }

  // Who waits where, when not all threads wait at the same barrier.
  std::string divergence() const {
    const std::pair<State, const char*> places[] = {{State::at_block_barrier, "wait at __syncthreads"},
                                                    {State::at_grid_barrier, "wait at grid.sync"},
                                                    {State::in_warp, "wait in a warp operation"},
                                                    {State::finished, "have returned"}};
    std::string message = name() + ": divergent barrier:";
    const char* separator = " ";
    for (const auto& [state, what] : places) {
      const auto in_state = [state = state](const Thread& thread) { return thread.state == state; };
      const auto first = std::find_if(threads_.begin(), threads_.end(), in_state);
      if (first != threads_.end()) {
        const auto number = std::count_if(threads_.begin(), threads_.end(), in_state);
        message +=
            separator + text("%td of %zu threads %s (first ", number, threads_.size(), what) +
            coordinates(first->index) +
            (state == State::in_warp ? text(": %s, mask 0x%08x", first->operation.name, first->operation.mask) : "") +
            ")";
        separator = ", ";
      }
    }
    return message;
  }

  uint3 index_;
  std::vector<unsigned char> shared_;  // while another block runs
  std::vector<Thread> threads_;
};

void run_one_after_another(Order& order, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body) {
  for (const size_t number : order.of(volume(gridDim))) {
    Block block(number, shared_bytes, fibers, body);
    if (block.run(order) == State::at_grid_barrier) {
      throw Fault(block.name() + ": grid.sync in a launch that is not cooperative");
    }
  }
}

void run_together(Order& order, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body) {
  std::vector<Block> blocks;
  for (size_t number = 0; number < volume(gridDim); ++number) {
    blocks.emplace_back(number, shared_bytes, fibers + number * volume(blockDim), body);
  }
  while (true) {
    std::vector<State> states(blocks.size());
    for (const size_t number : order.of(blocks.size())) {
      states[number] = blocks[number].run(order);
    }
    const auto odd = std::find_if(states.begin(), states.end(), [&](State state) { return state != states[0]; });
    if (odd != states.end()) {
      const char* what[] = {" has returned", " waits at grid.sync"};
      throw Fault("divergent grid barrier: " + blocks[0].name() + what[states[0] == State::at_grid_barrier] + ", " +
                  blocks[static_cast<size_t>(odd - states.begin())].name() + what[*odd == State::at_grid_barrier]);
    }
    if (states[0] == State::finished) {
      return;
    }
    for (Block& block : blocks) {
      block.release();
    }
    forget_accesses();
  }
}

std::string kernel_name(const void* kernel) {
  char name[512];
  void* const inside = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(kernel) + 1);  // it takes a return address
  __sanitizer_symbolize_pc(inside, "%f", name, sizeof name);
  return name;
}

// --- the state of the "device" ---------------------------------------------------------------------------------------

std::mutex device_mutex;
std::unordered_map<const void*, size_t> shared_limits;  // that cudaFuncSetAttribute raised
std::string last_failure;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) { return last_error = error; }

int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

int multiprocessors() { return std::max(1, from_environment("CUDA_HOST_MULTIPROCESSORS", 2)); }

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, bool cooperative) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (volume(grid) == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || volume(block) == 0 ||
      volume(block) > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  const auto raised = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (raised != shared_limits.end() ? raised->second : shared_default_limit)) {
    return cudaErrorInvalidValue;
  }
  int resident;
  blocks_per_multiprocessor(&resident, static_cast<int>(volume(block)), config.dynamicSmemBytes);
  if (cooperative && volume(grid) > static_cast<size_t>(resident) * static_cast<size_t>(multiprocessors())) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

const Moment* now() { return current != nullptr ? &current->moment : nullptr; }

bool on_own_stack(uintptr_t address) { return current->fiber->contains(address); }

std::string thread_name(const Moment& moment) {
  return "thread " + coordinates(position(moment.thread, blockDim)) + " of block " +
         coordinates(position(moment.block, gridDim));
}

void fail(std::string message) {
  current->fault = std::move(message);
  Fiber::yield();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const std::lock_guard lock(device_mutex);
  const bool cooperative = std::any_of(config.attrs, config.attrs + config.numAttrs, [](const auto& attribute) {
    return attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative != 0;
  });
  if (const cudaError_t error = check(config, kernel, cooperative); error != cudaSuccess) {
    return remember(error);
  }
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  static std::deque<Fiber> stacks;
  stacks.resize(std::max(stacks.size(), volume(blockDim) * (cooperative ? volume(gridDim) : 1)));
  std::vector<Fiber*> fibers;
  for (Fiber& stack : stacks) {
    fibers.push_back(&stack);
  }
  __asan_poison_memory_region(cuda_host_shared_memory, shared_limit);
  __asan_unpoison_memory_region(cuda_host_shared_memory, config.dynamicSmemBytes);
  forget_accesses();
  cudaError_t error = cudaSuccess;
  try {
    Order order;
    (cooperative ? run_together : run_one_after_another)(order, config.dynamicSmemBytes, fibers.data(), thread);
  } catch (const Fault& fault) {
    last_failure = "cuda_host: kernel " + kernel_name(kernel) + ", " + fault.what();
    std::fprintf(stderr, "%s\n", last_failure.c_str());
    error = cudaErrorLaunchFailure;
  }
  __asan_poison_memory_region(cuda_host_shared_memory, shared_limit);
  return error == cudaSuccess ? error : remember(error);
}

cudaError_t blocks_per_multiprocessor(int* blocks, int threads, size_t shared_bytes) {
  *blocks = static_cast<int>(std::min({threads_per_multiprocessor / static_cast<size_t>(threads), size_t{32},
                                       shared_per_multiprocessor / (shared_bytes + shared_reserved)}));
  return cudaSuccess;
}

void shuffle(const char* name, Shuffle kind, unsigned mask, void* value, size_t size, int operand, int width) {
  const int lane = static_cast<int>(current->moment.thread % warpSize), first = lane / width * width,
            last = first + width - 1;
  int source = 0;
  switch (kind) {  // where it falls out of the segment, a lane keeps its own value
    case Shuffle::up:
      source = lane - operand >= first ? lane - operand : lane;
      break;
    case Shuffle::down:
      source = lane + operand <= last ? lane + operand : lane;
      break;
    case Shuffle::butterfly:
      source = (lane ^ operand) <= last ? lane ^ operand : lane;
      break;
    case Shuffle::indexed:
      source = first + (operand & (width - 1));
      break;
  }
  if ((mask >> lane & 1) == 0) {
    fail(text("%s by lane %d, which its mask 0x%08x leaves out", name, lane, mask));
  }
  current->operation = {name, mask, size, static_cast<unsigned>(source), {}};
  std::memcpy(current->operation.value, value, size);
  wait(State::in_warp);
  std::memcpy(value, current->operation.value, size);
}

}  // namespace cuda_host

using namespace cuda_host;

void __syncthreads() { wait(State::at_block_barrier); }
void __syncwarp(unsigned mask) {
  char nothing = 0;
  shuffle("__syncwarp", Shuffle::indexed, mask, &nothing, 0, 0, warpSize);
}
void cooperative_groups::grid_group::sync() const { wait(State::at_grid_barrier); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return last_failure.c_str();
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = from_environment("CUDA_HOST_COOPERATIVE", 1);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard lock(device_mutex);
  if (value < 0 || static_cast<size_t>(value) > shared_limit) {
    return remember(cudaErrorInvalidValue);
  }
  shared_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
