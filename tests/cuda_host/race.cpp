// Finds races: the compiler's ThreadSanitizer instrumentation, which calls the functions below at every access, but
// with CUDA's rules of what orders two accesses. Only what was compiled with -fsanitize=thread calls them.
#include <sanitizer/common_interface_defs.h>

#include <cstdio>
#include <unordered_map>

#include "position.h"

namespace cuda_host {
namespace {

struct Access {
  Moment moment;
  const void* code = nullptr;  // null: no access yet
};

// The last accesses to two bytes, float16 being the shortest type that kernels write. Of the readers, two different
// ones.
struct History {
  Access write, read, other_read;
};

std::unordered_map<uintptr_t, History> global_histories;
std::unordered_map<uintptr_t, History> shared_histories;  // of the running block

bool ordered(const Moment& before, const Moment& after) {
  if (before.block != after.block) {
    return false;
  }
  return before.thread == after.thread || before.phase != after.phase ||
         (before.thread / 32 == after.thread / 32 && before.step != after.step);
}

std::string place(const void* code) {
  char text[256];
  __sanitizer_symbolize_pc(const_cast<void*>(code), "%S", text, sizeof text);
  return text;
}

bool in_shared_memory(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(shared_memory) < shared_limit; }

void report(uintptr_t address, const char* what, const void* code, const char* earlier_what, const Access& earlier) {
  char where[64];
  if (in_shared_memory(address)) {
    const size_t byte = address - reinterpret_cast<uintptr_t>(shared_memory);
    std::snprintf(where, sizeof where, "shared memory, byte %zu", byte);
  } else {
    std::snprintf(where, sizeof where, "global memory, %#zx", static_cast<size_t>(address));
  }
  fail(std::string("race on ") + where + ": " + what + " at " + place(code) + " and " + earlier_what + " by " +
       thread_name(earlier.moment) + " at " + place(earlier.code) + ", with no barrier in between");
}

void record(const volatile void* pointer, size_t size, bool write, const void* code) {
  const Moment* const moment = now();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  if (moment == nullptr || on_own_stack(begin)) {
    return;
  }
  auto& histories = in_shared_memory(begin) ? shared_histories : global_histories;
  for (uintptr_t address = begin / 2 * 2; address < begin + size; address += 2) {
    History& history = histories[address];
    const auto conflicts = [&](const Access& earlier) {
      return earlier.code != nullptr && !ordered(earlier.moment, *moment);
    };
    if (conflicts(history.write)) {
      return report(address, write ? "a write" : "a read", code, "a write", history.write);
    }
    if (write) {
      for (const Access& read : {history.read, history.other_read}) {
        if (conflicts(read)) {
          return report(address, "a write", code, "a read", read);
        }
      }
      history.write = {*moment, code};
    } else {
      if (history.read.moment.thread != moment->thread || history.read.moment.block != moment->block) {
        history.other_read = history.read;
      }
      history.read = {*moment, code};
    }
  }
}

}  // namespace

void forget_shared_accesses() { shared_histories.clear(); }
void forget_global_accesses() { global_histories.clear(); }

}  // namespace cuda_host

// --- what the compiler calls -----------------------------------------------------------------------------------------

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define CUDA_HOST_ACCESS(name, size, write) \
  void __tsan_##name(void* address) { cuda_host::record(address, size, write, __builtin_return_address(0)); }
#define CUDA_HOST_ACCESSES(size)                      \
  CUDA_HOST_ACCESS(read##size, size, false)           \
  CUDA_HOST_ACCESS(write##size, size, true)           \
  CUDA_HOST_ACCESS(unaligned_read##size, size, false) \
  CUDA_HOST_ACCESS(unaligned_write##size, size, true) \
  CUDA_HOST_ACCESS(volatile_read##size, size, false)  \
  CUDA_HOST_ACCESS(volatile_write##size, size, true)
CUDA_HOST_ACCESSES(1)
CUDA_HOST_ACCESSES(2)
CUDA_HOST_ACCESSES(4)
CUDA_HOST_ACCESSES(8)
CUDA_HOST_ACCESSES(16)

void __tsan_read_range(void* address, unsigned long size) {
  cuda_host::record(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long size) {
  cuda_host::record(address, size, true, __builtin_return_address(0));
}
}
