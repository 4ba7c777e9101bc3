// samples KERNEL FAULT: runs a sample kernel; exit status 0: right, 1: CUDA error, 2: wrong result (on stderr, both).
// samples convert: takes float32 on stdin; writes each as binary16 and what that is in float32, then as bfloat16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "samples.h"

namespace {

using samples::Fault;

constexpr int blocks = 4, count = 200;

Fault fault_named(const std::string& name) {
#define SAMPLES_NAME(name) #name,
  const char* const names[] = {SAMPLES_FAULTS(SAMPLES_NAME)};
  const auto found = std::find(std::begin(names), std::end(names), name);
  return static_cast<Fault>(found - std::begin(names));
}

int report(const char* error) {
  if (error != nullptr) {
    std::fprintf(stderr, "CUDA error: %s\n", error);
  }
  return error != nullptr ? 1 : 0;
}

int compare(const std::vector<float>& output, const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(output[i] == expected[i])) {
      std::fprintf(stderr, "wrong result: output[%zu] = %g, expected %g\n", i, output[i], expected[i]);
      return 2;
    }
  }
  return 0;
}

// Integers, of which float sums are exact in any order.
std::vector<float> numbers(size_t size) {
  std::vector<float> values(size);
  for (size_t i = 0; i < size; ++i) {
    values[i] = static_cast<float>((i * 37 + 11) % 101);
  }
  return values;
}

int stencil(Fault fault) {
  const std::vector<float> input = numbers(count + 2);
  std::vector<float> output(count), expected(count);
  for (int i = 0; i < count; ++i) {
    expected[i] = input[i] + input[i + 1] + input[i + 2];
  }
  const int status = report(run_stencil(fault, input.data(), output.data(), count));
  return status != 0 ? status : compare(output, expected);
}

int sums(bool grid, Fault fault) {
  constexpr int each = 128;
  const std::vector<float> input = numbers(each * blocks);
  std::vector<float> output(grid ? blocks + 1 : blocks), expected(output.size());
  for (int i = 0; i < each * blocks; ++i) {
    expected[i / each] += input[i];
    expected.back() += grid ? input[i] : 0.0f;
  }
  const auto run = grid ? samples::run_grid_sum : samples::run_block_sum;
  const int status = report(run(fault, input.data(), output.data(), blocks));
  return status != 0 ? status : compare(output, expected);
}

template <typename Storage>
void convert(const std::vector<float>& values, Storage (*narrow)(float), float (*widen)(Storage)) {
  for (const float value : values) {
    const Storage stored = narrow(value);
    const float back = widen(stored);
    std::fwrite(&stored, sizeof stored, 1, stdout);
    std::fwrite(&back, sizeof back, 1, stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kernel = argc > 1 ? argv[1] : "";
  const Fault fault = fault_named(argc > 2 ? argv[2] : "none");
  if (kernel == "stencil") {
    return stencil(fault);
  }
  if (kernel == "block_sum" || kernel == "grid_sum") {
    return sums(kernel == "grid_sum", fault);
  }
  if (kernel == "convert") {
    std::vector<float> values;
    for (float value; std::fread(&value, sizeof value, 1, stdin) == 1;) {
      values.push_back(value);
    }
    convert<__half>(values, __float2half_rn, __half2float);
    convert<__nv_bfloat16>(values, __float2bfloat16_rn, __bfloat162float);
    return 0;
  }
  std::fprintf(stderr, "usage: samples stencil|block_sum|grid_sum FAULT | samples convert\n");
  return 3;
}
