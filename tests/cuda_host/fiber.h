// A function on a stack of its own, which can be left and entered again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#if !defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_UCONTEXT
#endif
#ifdef CUDA_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls `body` from its beginning; whatever ran here before is forgotten.
  void start(const std::function<void()>& body);
  // Run until it yields or returns.
  void resume();
  bool finished() const { return finished_; }

  bool contains(uintptr_t address) const;

  // Leave the fiber that runs.
  static void yield();

 private:
#ifdef CUDA_HOST_UCONTEXT
  using Context = ucontext_t;
#else
  using Context = void*;  // the stack pointer: everything else is on the stack
#endif
  static void enter();
  void leave(bool for_ever);

  void* memory_;
  void* stack_;
  const std::function<void()>* body_ = nullptr;
  bool finished_ = true;
  Context own_, outside_;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace cuda_host
