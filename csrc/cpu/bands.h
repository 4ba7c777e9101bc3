// What a lane of a block is: an image or, where the images are too few to fill the lanes, a band of an image's rows.
#pragma once

#include <algorithm>

#include "../geometry.h"

namespace lenet_fast::cpu {

// `per_image` bands of equally many convolution rows each, computed as images of their own: `piece` is the geometry of
// one, its input rows with the K - 1 that neighbouring bands share. With more than one band, `frame` is the padding,
// which has become part of the piece's input.
struct Bands {
  int64_t per_image;
  ConvGeometry piece;
  int64_t frame;

  int64_t conv_rows() const { return piece.conv_height(); }
};

inline Bands cut(const ConvGeometry& g, int64_t per_image) {
  Bands bands{per_image, g, 0};
  if (per_image > 1) {
    bands.frame = g.padding;
    bands.piece.batch = g.batch * per_image;
    bands.piece.height = g.conv_height() / per_image + g.kernel_size - 1;
    bands.piece.width = g.padded_width();
    bands.piece.padding = 0;
  }
  return bands;
}

// Among the cuts within a tenth of the least work, the coarsest that makes enough blocks for several threads. It
// depends on the geometry alone, so that results do not depend on the number of threads.
inline Bands choose_bands(const ConvGeometry& g, int64_t lanes) {
  constexpr int64_t enough = 4;
  constexpr double shared_row = 0.125;  // loading a shared input row costs this many rows of the convolution
  const int64_t pairs = g.conv_height() % 2 == 0 ? g.conv_height() / 2 : 1;
  const int64_t finest = std::min(pairs, 2 * enough * lanes / std::max<int64_t>(1, g.batch));
  const auto blocks = [&](int64_t bands) { return (g.batch * bands + lanes - 1) / lanes; };
  const auto work = [&](int64_t bands) {
    const double rows = static_cast<double>(g.conv_height()) / static_cast<double>(bands);
    return static_cast<double>(blocks(bands)) * (rows + shared_row * static_cast<double>(g.kernel_size - 1));
  };
  double least = work(1);
  for (int64_t bands = 2; bands <= finest; ++bands) {
    least = pairs % bands == 0 ? std::min(least, work(bands)) : least;
  }
  int64_t chosen = 0, most = 0;
  for (int64_t bands = 1; bands <= std::max<int64_t>(1, finest); ++bands) {
    if (pairs % bands == 0 && work(bands) <= 1.1 * least && std::min(enough, blocks(bands)) > most) {
      chosen = bands;
      most = std::min(enough, blocks(bands));
    }
  }
  return cut(g, std::max<int64_t>(1, chosen));
}

// The gradient of the input from that of its bands' pieces, which overlap.
template <typename T>
void merge_bands(T* grad_input, const T* pieces, const ConvGeometry& image, const Bands& bands) {
  const ConvGeometry& piece = bands.piece;
  std::fill(grad_input, grad_input + image.batch * image.in_channels * image.height * image.width, T(0));
  for (int64_t p = 0; p < piece.batch; ++p) {
    const int64_t top = p % bands.per_image * bands.conv_rows() - bands.frame;
    for (int64_t c = 0; c < image.in_channels; ++c) {
      T* target = grad_input + (p / bands.per_image * image.in_channels + c) * image.height * image.width;
      const T* source = pieces + (p * piece.in_channels + c) * piece.height * piece.width + bands.frame;
      for (int64_t y = std::max<int64_t>(0, -top); y < std::min(piece.height, image.height - top); ++y) {
        for (int64_t x = 0; x < image.width; ++x) {
          target[(top + y) * image.width + x] += source[y * piece.width + x];
        }
      }
    }
  }
}

}  // namespace lenet_fast::cpu
