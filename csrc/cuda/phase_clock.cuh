// The phases of a training step, and when each of them ends.
//
// An ordinary build waits for the block where a phase ends, and does nothing else. A build with LENET_FAST_CLOCKS also
// lets one thread of three blocks store the multiprocessor's clock there, in the first steps of a run, for
// benchmarks/phase_clocks.py.
#pragma once

#include <cstdint>

#include "../network.h"

namespace lenet_fast::cuda {

// In the order of a step. The phases of an image are from `load` to `gradients`.
#define LENET_FAST_PHASES(X)                                                                   \
  X(begin)            /* nothing: the step's start */                                          \
  X(stage)            /* the convolutions' weights go to shared memory */                      \
  X(load)             /* an image goes to shared memory */                                     \
  X(convolution)      /* forward, with activation and pooling */                               \
  X(dense)            /* forward, with activation */                                           \
  X(score)            /* scores of the classes */                                              \
  X(loss)             /* the loss, and its gradient by the scores */                           \
  X(output_gradient)  /* from the gradient of the scores to that of the last layer's output */ \
  X(dense_activation) /* backward of a dense layer's activation */                             \
  X(dense_gradient)   /* a dense layer's input gradient; its operands go to global memory */   \
  X(conv_activation)  /* backward of pooling and activation */                                 \
  X(gradients)        /* a convolution's weight gradient and input gradient */                 \
  X(sums)             /* the block's sums of gradients go to global memory */                  \
  X(first_barrier)    /* waiting for the other blocks */                                       \
  X(loss_sum)         /* the loss over the batch, and the optimizer's scalars */               \
  X(gradient_sums)    /* each parameter's gradient over the batch */                           \
  X(update)           /* new values of parameters and moments */                               \
  X(second_barrier)   /* waiting for the other blocks */

enum class Phase : int32_t {
#define LENET_FAST_PHASE(name) name,
  LENET_FAST_PHASES(LENET_FAST_PHASE)
#undef LENET_FAST_PHASE
};

#ifdef LENET_FAST_CLOCKS

#define LENET_FAST_PHASE(name) +1
inline constexpr int kPhases = 0 LENET_FAST_PHASES(LENET_FAST_PHASE);
#undef LENET_FAST_PHASE
inline constexpr int kClockBlocks = 3, kClockSteps = 20, kClockRounds = 32, kClockLayers = 4;
static_assert(kClockLayers >= kMaxConvs && kClockLayers >= kMaxDenses);

// The clock at the end of each phase, 0 where none was stored. A round is an image of the block, or as many parameters
// as the block updates at a time.
static __device__ long long phase_clocks[kClockBlocks][kClockSteps][kClockRounds][kPhases][kClockLayers];

class PhaseClock {
 public:
  explicit __device__ PhaseClock(int step) : step_(step) {}
  __device__ void next_round() { ++round_; }

  // Without waiting for the block.
  __device__ void stamp(Phase phase, int layer = 0) const {
    const unsigned last = gridDim.x - 1;
    const int block = blockIdx.x == 0 ? 0 : blockIdx.x == last ? 2 : blockIdx.x == last / 2 ? 1 : -1;
    if (threadIdx.x == 0 && block >= 0 && step_ < kClockSteps && round_ < kClockRounds) {
      phase_clocks[block][step_][round_][static_cast<int>(phase)][layer] = clock64();
    }
  }

 private:
  int step_, round_ = 0;

#else

class PhaseClock {
 public:
  explicit __device__ PhaseClock(int) {}
  __device__ void next_round() {}
  __device__ void stamp(Phase, int = 0) const {}

#endif

 public:
  __device__ void end(Phase phase, int layer = 0) const {
    __syncthreads();
    stamp(phase, layer);
  }
};

}  // namespace lenet_fast::cuda
