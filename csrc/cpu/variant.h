// The body of every instruction-set variant. A variant's source sets LENET_FAST_ISA, LENET_FAST_VECTOR_BYTES and
// LENET_FAST_VECTOR_REGISTERS, includes the headers below this line itself before switching the target, so that no
// inline function of the standard library is compiled for a machine that may lack the instructions, then includes this.
#pragma once

#include "conv_act_pool.h"
#include "network_pass.h"

#define LENET_FAST_STRING_(x) #x
#define LENET_FAST_STRING(x) LENET_FAST_STRING_(x)

namespace lenet_fast::cpu::LENET_FAST_ISA {

const Kernels kernels = {LENET_FAST_STRING(LENET_FAST_ISA), conv_act_pool_kernels<float>(),
                         conv_act_pool_kernels<double>(), network_kernels<float>(), network_kernels<double>()};

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
