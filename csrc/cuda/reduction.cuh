// Sums in a fixed order: over a warp, over a block, over rows of partial sums. No atomics, so every run gives the same
// bits.
#pragma once

#include "layer.cuh"
#include "numeric.cuh"
#include "shared_memory.cuh"

namespace lenet_fast::cuda {

// The sum over a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sums over the block of N values a thread, in thread 0; scratch holds N values a warp. Threads: whole warps.
template <int N, typename T>
__device__ __forceinline__ void block_sum(T (&values)[N], T* scratch) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // scratch may still be read
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T sum = warp_sum(values[i]);
    if (threadIdx.x % 32 == 0) {
      scratch[warp * N + i] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = scratch[i];
    }
    for (int w = 1; w < warps; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[i] += scratch[w * N + i];
      }
    }
  }
}

// Part of a row of sums, and the gradient that it is summed into.
template <typename S>
struct Segment {
  S* target;  // null: not wanted
  int length;
};

template <typename S>
struct SumRows {
  const Compute<S>* rows;  // (count, the segments' lengths together)
  int count;
  Segment<S> segments[4];  // weight, bias, coefficient, subsample_bias

  __host__ __device__ int length() const {
    return segments[0].length + segments[1].length + segments[2].length + segments[3].length;
  }
};

inline constexpr int kSumColumns = 32, kSumGroups = 16;

// target[i] = the sum of column i. Rows are dealt to kSumGroups threads, whose sums are added in order.
// One operation a value read: bound by bandwidth, in practice by latency, hence many short chains.
template <typename S>
__global__ void __launch_bounds__(kSumColumns* kSumGroups) sum_rows(const __grid_constant__ SumRows<S> a) {
  using T = Compute<S>;
  T* const partial = reinterpret_cast<T*>(shared_memory());
  const int column_in_block = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns;
  const int length = a.length();
  int column = blockIdx.x * kSumColumns + column_in_block;
  T sum = T(0);
  if (column < length) {
#pragma unroll 8
    for (int row = group; row < a.count; row += kSumGroups) {
      sum += a.rows[static_cast<int64_t>(row) * length + column];
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || column >= length) {
    return;
  }
  for (int g = 1; g < kSumGroups; ++g) {
    sum += partial[g * kSumColumns + column_in_block];
  }
  for (const Segment<S>& segment : a.segments) {
    if (column < segment.length) {
      if (segment.target != nullptr) {
        segment.target[column] = narrow<S>(sum);
      }
      return;
    }
    column -= segment.length;
  }
}

}  // namespace lenet_fast::cuda
