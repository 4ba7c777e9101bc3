// The activations by name. Constants of scaled_tanh: LeCun et al. (1998), appendix A, f(a) = A tanh(S a).
#pragma once

namespace lenet_fast {

enum class Activation { identity, relu, sigmoid, tanh, scaled_tanh };

inline constexpr double kScaledTanhAmplitude = 1.7159;
inline constexpr double kScaledTanhSlope = 2.0 / 3.0;

}  // namespace lenet_fast
