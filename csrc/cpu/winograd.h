// Winograd's minimal filtering: two neighbouring outputs of a filter of five taps, as F(2, 3) over the first three taps
// and F(2, 2) over the other two (S. Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast
// Algorithms for Convolutional Neural Networks, 2016). 7 multiplications instead of 10; in two dimensions 49, not 100.
//
// Products for the same outputs are summed before the outputs are formed, so that there are 4 sums instead of 7. The
// interpolation points are 0, 1, -1 and infinity alone: nothing grows, and float32 results are as close to the exact
// ones as those of direct sums. (But outputs that an infinite pixel reaches are NaN where direct sums are infinite.)
#pragma once

#include "vec.h"

namespace lenet_fast::cpu::LENET_FAST_ISA::winograd {

// Whether the sums of a few windows and all else that their products need are registers.
inline constexpr bool kFitsRegisters = LENET_FAST_VECTOR_REGISTERS >= 32;

inline constexpr int kTaps = 5, kPixels = 6, kPoints = 7, kSums = 4, kOutputs = 2;

// Point p of the input = sum of kInput[p][k] * pixel k.
inline constexpr int kInput[kPoints][kPixels] = {{1, 0, -1, 0, 0, 0}, {0, 0, 0, 1, -1, 0}, {0, 1, 1, 0, 0, 0},
                                                 {0, 0, 0, 0, 1, 0},  {0, -1, 1, 0, 0, 0}, {0, -1, 0, 1, 0, 0},
                                                 {0, 0, 0, 0, -1, 1}};

// Point p of the weight = kScale[p] * sum of kWeight[p][k] * tap k.
inline constexpr int kWeight[kPoints][kTaps] = {{1, 0, 0, 0, 0},  {0, 0, 0, 1, 0}, {1, 1, 1, 0, 0}, {0, 0, 0, 1, 1},
                                                {1, -1, 1, 0, 0}, {0, 0, 1, 0, 0}, {0, 0, 0, 0, 1}};
inline constexpr double kScale[kPoints] = {1, 1, 0.5, 1, 0.5, 1, 1};

// Sum s has the products of points kSumBegin[s] to kSumBegin[s + 1] - 1.
inline constexpr int kSumBegin[kSums + 1] = {0, 2, 4, 5, 7};

// Output y = sum of kOutput[y][s] * sum s; sum y is the first that it has.
inline constexpr int kOutput[kOutputs][kSums] = {{1, 1, 1, 0}, {0, 1, -1, 1}};

constexpr int sum_of(int point) {
  int sum = 0;
  while (kSumBegin[sum + 1] <= point) {
    ++sum;
  }
  return sum;
}

// Sum of coefficient(k) * value(k) over k < Count; coefficients are 0, 1 and -1, at least one of them 1.
template <int Count, typename Coefficient, typename F>
LF_INLINE auto combination(Coefficient, F&& value) {
  constexpr int first = [] {
    int k = 0;
    while (Coefficient{}(k) != 1) {
      ++k;
    }
    return k;
  }();
  auto sum = value(first);
  unroll<Count>([&](auto k) __attribute__((always_inline)) {
    if constexpr (k != first && Coefficient{}(k) == 1) {
      sum += value(k);
    } else if constexpr (Coefficient{}(k) == -1) {
      sum -= value(k);
    }
  });
  return sum;
}

template <int Point, typename F>
LF_INLINE auto input_point(F&& pixel) {
  return combination<kPixels>([](int k) { return kInput[Point][k]; }, pixel);
}

// The gradient of a pixel from those of the points.
template <int Pixel, typename F>
LF_INLINE auto pixel_gradient(F&& point) {
  return combination<kPoints>([](int p) { return kInput[p][Pixel]; }, point);
}

template <int Output, typename F>
LF_INLINE auto output(F&& sum) {
  return combination<kSums>([](int s) { return kOutput[Output][s]; }, sum);
}

// The gradient of a sum from those of the outputs.
template <int Sum, typename F>
LF_INLINE auto sum_gradient(F&& grad_output) {
  return combination<kOutputs>([](int y) { return kOutput[y][Sum]; }, grad_output);
}

template <int Point, typename F>
LF_INLINE auto weight_point(F&& tap) {
  const auto sum = combination<kTaps>([](int k) { return kWeight[Point][k]; }, tap);
  return static_cast<decltype(sum)>(kScale[Point]) * sum;
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA::winograd
