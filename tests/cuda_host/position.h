// Where a launch is: what the race detector knows of the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_host {

// A moment in the life of one thread. `phase` counts its block's barriers, `step` its warp's operations.
struct Moment {
  uint32_t block, thread, phase, step;
};

constexpr size_t shared_limit = size_t{227} << 10;  // bytes of a block, as on an H100
extern unsigned char* const shared_memory;

// The running thread's, or null outside a kernel.
const Moment* now();
bool on_own_stack(uintptr_t address);
std::string thread_name(const Moment& moment);

// From within a kernel: ends the launch with an error. Never comes back.
void fail(std::string message);

// Accesses from here on do not race with earlier ones: another block's shared memory is in place; a launch begins, or
// the grid has synchronised.
void forget_shared_accesses();
void forget_global_accesses();

}  // namespace cuda_host
