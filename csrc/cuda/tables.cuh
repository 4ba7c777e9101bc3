// Connection tables in device memory.
#pragma once

#include <vector>

#include "../geometry.h"
#include "upload.cuh"

namespace lenet_fast::cuda {

// (out, in): the position of the connection in the weight, or -1; as AnyTable reads it.
inline std::vector<int32_t> connection_indices(const ConvGeometry& g) {
  std::vector<int32_t> indices(g.out_channels * g.in_channels, -1);
  for (int64_t out = 0; out < g.out_channels; ++out) {
    for (int32_t c = g.connections.row_begin[out]; c < g.connections.row_begin[out + 1]; ++c) {
      indices[out * g.in_channels + g.connections.in_channel[c]] = c;
    }
  }
  return indices;
}

inline void upload_indices(const ConvGeometry& g, int32_t* target, cudaStream_t stream) {
  const std::vector<int32_t> indices = connection_indices(g);
  upload(indices.data(), static_cast<int64_t>(indices.size()), target, stream);
}

}  // namespace lenet_fast::cuda
