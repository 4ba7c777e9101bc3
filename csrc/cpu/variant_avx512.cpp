// 512-bit vectors, 32 registers.
#include "variant_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

#define LENET_FAST_ISA avx512
#define LENET_FAST_VECTOR_BYTES 64
#define LENET_FAST_VECTOR_REGISTERS 32
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
