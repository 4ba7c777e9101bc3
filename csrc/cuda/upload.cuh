// Small tables from host to device memory as kernel arguments: no copy from host memory that a captured graph would
// read again at each replay, no synchronisation.
#pragma once

#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace lenet_fast::cuda {

struct TablePiece {
  static constexpr int capacity = 960;
  int count;
  int32_t* target;
  int32_t values[capacity];
};

static __global__ void upload_table(const __grid_constant__ TablePiece a) {
  for (int i = threadIdx.x; i < a.count; i += blockDim.x) {
    a.target[i] = a.values[i];
  }
}

// T: a multiple of four bytes.
template <typename T>
void upload(const T* values, int64_t count, T* target, cudaStream_t stream) {
  static_assert(sizeof(T) % sizeof(int32_t) == 0 && std::is_trivially_copyable_v<T>);
  const int64_t words = count * static_cast<int64_t>(sizeof(T) / sizeof(int32_t));
  for (int64_t first = 0; first < words; first += TablePiece::capacity) {
    TablePiece piece;
    piece.count = static_cast<int>(std::min<int64_t>(TablePiece::capacity, words - first));
    piece.target = reinterpret_cast<int32_t*>(target) + first;
    std::memcpy(piece.values, reinterpret_cast<const int32_t*>(values) + first, piece.count * sizeof(int32_t));
    launch(&upload_table, "upload_table", 1, 256, 0, stream, piece);
  }
}

}  // namespace lenet_fast::cuda
