// Launches that are recorded once and queued many times: the host pays for one call instead of each launch.
#pragma once

#include "launch.cuh"

namespace lenet_fast::cuda {

// A CUDA handle and how to destroy it.
template <typename Handle, cudaError_t (*destroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  ~Owned() {
    if (handle_ != nullptr) {
      destroy(handle_);
    }
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  Handle get() const { return handle_; }
  Handle* target() { return &handle_; }

 private:
  Handle handle_ = nullptr;
};

class LaunchGraph {
 public:
  // `record` is given a stream to launch on; nothing runs.
  template <typename Record>
  explicit LaunchGraph(const Record& record) {
    Owned<cudaStream_t, cudaStreamDestroy> stream;  // the current one may be the legacy stream: no capture of that
    check(cudaStreamCreateWithFlags(stream.target(), cudaStreamNonBlocking), "stream");
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeRelaxed), "graph capture");
    Owned<cudaGraph_t, cudaGraphDestroy> graph;
    try {
      record(stream.get());
    } catch (...) {
      cudaStreamEndCapture(stream.get(), graph.target());
      throw;
    }
    check(cudaStreamEndCapture(stream.get(), graph.target()), "graph capture");
    check(cudaGraphInstantiate(executable_.target(), graph.get(), 0), "graph");
  }

  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(executable_.get(), stream), "graph launch"); }

 private:
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> executable_;  // the driver keeps one that still runs
};

// Whether what is launched on `stream` becomes part of a graph that somebody else records.
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "stream");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace lenet_fast::cuda
