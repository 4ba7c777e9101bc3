// 256-bit vectors with fused multiply-add.
#include "variant_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LENET_FAST_ISA avx2
#define LENET_FAST_VECTOR_BYTES 32
#define LENET_FAST_VECTOR_REGISTERS 16
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
