// The answers of the devices that were asked whether the kernels can run on them, for the operators and for Python.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda/served.h"
#include "current_stream.h"
#include "served_device.h"

namespace lenet_fast::cuda {
namespace {

std::mutex mutex;
std::map<int32_t, std::string> answers;  // by device index

std::string ask(int32_t device) {
  const DeviceGuard guard(device);
  const std::optional<std::string> answer = ask_current_device();
  if (!answer.has_value()) {
    return "";  // whatever CUDA has to report, the kernels' own launch will
  }
  const std::lock_guard lock(mutex);
  return answers[device] = *answer;
}

}  // namespace

std::string why_unserved(int32_t device) {
  {
    const std::lock_guard lock(mutex);
    if (const auto known = answers.find(device); known != answers.end()) {
      return known->second;
    }
  }
  return ask(device);
}

}  // namespace lenet_fast::cuda

// Asks the device (anew) and writes the reason, cut to `size` bytes with the 0 at its end, for lenet_fast/backends.py.
// An error that says nothing about the kernels (a device that is busy, say) is no reason: their launch will report it.
extern "C" __attribute__((visibility("default"))) void lenet_fast_why_unserved(int32_t device, char* reason,
                                                                               size_t size) {
  std::string answer;
  try {
    answer = lenet_fast::cuda::ask(device);
  } catch (const std::exception&) {
    answer.clear();
  }
  const size_t length = std::min(answer.size(), size - 1);
  std::memcpy(reason, answer.data(), length);
  reason[length] = 0;
}
