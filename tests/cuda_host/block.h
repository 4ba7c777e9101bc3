// One block of a launch: its threads, in an order that can be chosen, from barrier to barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "position.h"

namespace cuda_host {

// What a kernel did that no GPU would forgive; ends the launch.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which independent things run: CUDA_HOST_ORDER=forward (default), reverse, or the seed of a random one.
// CUDA_HOST_SKIP_BARRIER=n plants a fault: threads run through their n-th __syncthreads, counted from 0.
class Order {
 public:
  Order();
  // 0 .. count-1, a new order at every call if it is random.
  std::vector<size_t> of(size_t count);

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
  bool has_skipped = false;  // the barrier to skip
  WarpOperation operation;
  std::string fault;
};

inline size_t volume(dim3 size) { return size_t{size.x} * size.y * size.z; }
uint3 position(size_t number, dim3 size);

class Block {
 public:
  // Of the current gridDim and blockDim; the fibers stay the caller's.
  Block(size_t number, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body);

  // Until every thread has returned or waits for the grid; which of the two.
  State run(Order& order);
  // Past the barrier at which all threads wait.
  void release();
  std::string name() const;

 private:
  void run_warp(Order& order, size_t warp);
  void resume(Thread& thread);
  bool finish_warp_operation(Thread* lanes, size_t count);
  void exchange(Thread* lanes, unsigned members);
  std::string divergence() const;

  uint3 index_;
  std::vector<unsigned char> shared_;  // while another block runs
  std::vector<Thread> threads_;
};

}  // namespace cuda_host
