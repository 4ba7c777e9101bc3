// Philox4x32-10, the counter-based random numbers of Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
// On the CPU it is included inside the target pragma of a variant, whose vectors it computes with.
#pragma once

#include <cstdint>

namespace lenet_fast {

// The four words of `counter` become random ones, a function of them and of the key. A word is 32 bits, the lower half
// of the 64 of `Word`, a number or a vector of numbers; what the upper half holds has no effect. product(m, w) is the
// whole product of m and the lower half of w.
template <typename Word, typename Product>
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline __attribute__((always_inline)) void philox(Word (&counter)[4], uint64_t key, Product product) {
  auto lower_key = static_cast<uint32_t>(key), upper_key = static_cast<uint32_t>(key >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // unrolled, the keys of all rounds would be kept in registers
#endif
  for (int round = 0; round < 10; ++round) {
    const Word a = product(0xD2511F53u, counter[0]), b = product(0xCD9E8D57u, counter[2]);
    counter[0] = (b >> 32) ^ counter[1] ^ static_cast<uint64_t>(lower_key);
    counter[1] = b;
    counter[2] = (a >> 32) ^ counter[3] ^ static_cast<uint64_t>(upper_key);
    counter[3] = a;
    lower_key += 0x9E3779B9u;
    upper_key += 0xBB67AE85u;
  }
}

}  // namespace lenet_fast
