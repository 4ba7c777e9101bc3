#include "fiber.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace cuda_host {
namespace {

constexpr size_t stack_bytes = size_t{128} << 10;
Fiber* running = nullptr;
const void* outside_stack = nullptr;  // of whoever resumed it
size_t outside_stack_bytes = 0;

}  // namespace

#ifndef CUDA_HOST_UCONTEXT
// ucontext asks the kernel for the signal mask at every switch: ten times slower.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif

Fiber::Fiber() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  memory_ = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory_ == MAP_FAILED || mprotect(memory_, guard, PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  stack_ = static_cast<char*>(memory_) + guard;
}

Fiber::~Fiber() {
  __asan_unpoison_memory_region(stack_, stack_bytes);
  munmap(memory_, static_cast<size_t>(static_cast<char*>(stack_) - static_cast<char*>(memory_)) + stack_bytes);
}

void Fiber::start(const std::function<void()>& body) {
  if (!finished_) {  // abandoned half-way: its frames are still poisoned
    __asan_unpoison_memory_region(stack_, stack_bytes);
  }
  body_ = &body;
  finished_ = false;
  fake_stack_ = nullptr;
#ifdef CUDA_HOST_UCONTEXT
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = stack_bytes;
  own_.uc_link = nullptr;
  makecontext(&own_, &Fiber::enter, 0);
#else
  // What cuda_host_switch pops: six registers and the address of enter(), above it a return address that ends traces.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + stack_bytes) - 1;
  top[0] = 0;
  top[-1] = reinterpret_cast<uintptr_t>(&Fiber::enter);
  for (int i = 2; i <= 7; ++i) {
    top[-i] = 0;
  }
  own_ = top - 7;
#endif
}

void Fiber::resume() {
  running = this;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, stack_bytes);
#ifdef CUDA_HOST_UCONTEXT
  swapcontext(&outside_, &own_);
#else
  cuda_host_switch(&outside_, own_);
#endif
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  running = nullptr;
}

void Fiber::leave(bool for_ever) {
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, outside_stack, outside_stack_bytes);
#ifdef CUDA_HOST_UCONTEXT
  swapcontext(&own_, &outside_);
#else
  cuda_host_switch(&own_, outside_);
#endif
  __sanitizer_finish_switch_fiber(fake_stack_, &outside_stack, &outside_stack_bytes);
}

bool Fiber::contains(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(stack_) < stack_bytes; }

void Fiber::yield() { running->leave(false); }

void Fiber::enter() {
  __sanitizer_finish_switch_fiber(nullptr, &outside_stack, &outside_stack_bytes);
  Fiber* const self = running;
  (*self->body_)();
  self->finished_ = true;
  self->leave(true);
}

}  // namespace cuda_host
