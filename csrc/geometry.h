// Shapes and connections of one fused convolution, shared by every back end. No torch, no pointers owned.
#pragma once

#include <cstdint>

#include "activation.h"

namespace lenet_fast {

// 2x2, stride 2. subsample is LeCun's S layer: act(coefficient * (sum of the window) + pool_bias), per map.
enum class Pool { avg, max, none, subsample };

// One output map per row: its connections are row_begin[map] .. row_begin[map + 1], each naming an input map. A dense
// layer lists them all. The same connections grouped by input map serve the input gradient.
struct Connections {
  const int32_t* row_begin;     // (out_channels + 1)
  const int32_t* in_channel;    // (connections)
  const int32_t* column_begin;  // (in_channels + 1)
  const int32_t* column_entry;  // (connections): index of a connection, output maps ascending
  const int32_t* column_out;    // (connections): its output map
};

struct ConvGeometry {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_size, padding;
  Activation activation;
  Pool pool;
  Connections connections;

  int64_t num_connections() const { return connections.row_begin[out_channels]; }
  int64_t padded_height() const { return height + 2 * padding; }
  int64_t padded_width() const { return width + 2 * padding; }
  // Rows and columns of the convolution that are used: pooling drops an odd last one.
  int64_t conv_height() const { return used(padded_height() - kernel_size + 1); }
  int64_t conv_width() const { return used(padded_width() - kernel_size + 1); }
  int64_t out_height() const { return pool == Pool::none ? conv_height() : conv_height() / 2; }
  int64_t out_width() const { return pool == Pool::none ? conv_width() : conv_width() / 2; }

 private:
  int64_t used(int64_t size) const { return pool == Pool::none ? size : size / 2 * 2; }
};

}  // namespace lenet_fast
