#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "cooperative_groups.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

Thread* current = nullptr;
long long resumptions = 0;  // of all threads: the clock
uint32_t skipped_barrier;   // by every thread, counted from its start

std::string text(const char* format, auto... values) {
  char buffer[512];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

std::string coordinates(uint3 index) { return text("(%u,%u,%u)", index.x, index.y, index.z); }

void wait(State state) {
  current->state = state;
  Fiber::yield();
}

}  // namespace

uint3 position(size_t number, dim3 size) {
  return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

// --- order -----------------------------------------------------------------------------------------------------------

Order::Order() {
  const char* barrier = std::getenv("CUDA_HOST_SKIP_BARRIER");
  skipped_barrier = barrier != nullptr ? static_cast<uint32_t>(std::atoi(barrier)) : UINT32_MAX;
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

std::vector<size_t> Order::of(size_t count) {
  std::vector<size_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), size_t{0});
  if (name_ == "reverse") {
    std::reverse(numbers.begin(), numbers.end());
  } else if (name_ != "forward") {
    std::shuffle(numbers.begin(), numbers.end(), generator_);
  }
  return numbers;
}

// --- block -----------------------------------------------------------------------------------------------------------

Block::Block(size_t number, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body)
    : index_(position(number, gridDim)), shared_(shared_bytes, 0xff), threads_(volume(blockDim)) {  // NaN in any type
  for (size_t i = 0; i < threads_.size(); ++i) {
    threads_[i].fiber = fibers[i];
    threads_[i].index = position(i, blockDim);
    threads_[i].moment = {static_cast<uint32_t>(number), static_cast<uint32_t>(i), 0, 0};
    fibers[i]->start(body);
  }
}

State Block::run(Order& order) {
  blockIdx = index_;
  std::copy(shared_.begin(), shared_.end(), shared_memory);
  forget_shared_accesses();
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
      std::copy_n(shared_memory, shared_.size(), shared_.begin());
      return state;
    }
    release();
  }
}

void Block::release() {
  for (Thread& thread : threads_) {
    thread.state = State::ready;
    ++thread.moment.phase;
  }
}

std::string Block::name() const { return "block " + coordinates(index_); }

void Block::run_warp(Order& order, size_t warp) {
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

void Block::resume(Thread& thread) {
  ++resumptions;
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
bool Block::finish_warp_operation(Thread* lanes, size_t count) {
  unsigned waiting = 0, alive = 0;
  for (size_t lane = 0; lane < count; ++lane) {
    waiting |= static_cast<unsigned>(lanes[lane].state == State::in_warp) << lane;
    alive |= static_cast<unsigned>(lanes[lane].state != State::finished) << lane;
  }
  for (size_t lane = 0; lane < count; ++lane) {
    const unsigned members = lanes[lane].operation.mask & alive;
    if ((waiting >> lane & 1) != 0 && (members & ~waiting) == 0) {
      exchange(lanes, members);
      return true;
    }
  }
  return false;
}

void Block::exchange(Thread* lanes, unsigned members) {
  const Thread& first = lanes[__builtin_ctz(members)];
  unsigned char received[warpSize][sizeof WarpOperation::value];
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((members >> lane & 1) == 0) {
      continue;
    }
    const WarpOperation &own = lanes[lane].operation, &others = first.operation;
    const auto who = [&] { return name() + ", thread " + coordinates(lanes[lane].index) + ": "; };
    if (std::strcmp(own.name, others.name) != 0 || own.mask != others.mask || own.size != others.size) {
      throw Fault(who() + text("%s of %zu bytes with mask 0x%08x, while thread ", own.name, own.size, own.mask) +
                  coordinates(first.index) +
                  text(" of the warp calls %s of %zu bytes with mask 0x%08x", others.name, others.size, others.mask));
    }
    if (own.size > 0 && (members >> own.source & 1) == 0) {
      throw Fault(who() + text("%s reads lane %u, which takes no part", own.name, own.source));
    }
    std::memcpy(received[lane], lanes[own.size > 0 ? own.source : lane].operation.value, sizeof received[lane]);
  }
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if ((members >> lane & 1) != 0) {
      std::memcpy(lanes[lane].operation.value, received[lane], sizeof received[lane]);
      lanes[lane].state = State::ready;
      ++lanes[lane].moment.step;
    }
  }
}

// Who waits where, when not all threads wait at the same barrier.
std::string Block::divergence() const {
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
          separator + text("%td of %zu threads %s (first ", number, threads_.size(), what) + coordinates(first->index) +
          (state == State::in_warp ? text(": %s, mask 0x%08x", first->operation.name, first->operation.mask) : "") +
          ")";
      separator = ", ";
    }
  }
  return message;
}

// --- the running thread ----------------------------------------------------------------------------------------------

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

void __syncthreads() {
  if (current->moment.phase == skipped_barrier && !std::exchange(current->has_skipped, true)) {
    return;
  }
  wait(State::at_block_barrier);
}
long long clock64() { return resumptions; }
void __syncwarp(unsigned mask) {
  char nothing = 0;
  shuffle("__syncwarp", Shuffle::indexed, mask, &nothing, 0, 0, warpSize);
}
void cooperative_groups::grid_group::sync() const { wait(State::at_grid_barrier); }
