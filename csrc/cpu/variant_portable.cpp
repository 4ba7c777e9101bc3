// 128-bit vectors, as every x86-64 and AArch64 has them; also what compiles anywhere else.
#include "variant_prelude.h"

#define LENET_FAST_ISA portable
#define LENET_FAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LENET_FAST_VECTOR_REGISTERS 32
#else
#define LENET_FAST_VECTOR_REGISTERS 16
#endif
#include "variant.h"
