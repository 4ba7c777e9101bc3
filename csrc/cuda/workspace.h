// One block of memory in pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lenet_fast::cuda {

// Hands out pieces of one block of memory, or only counts them.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + offset);
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace lenet_fast::cuda
