// Streams that record launches, and graphs that run what was recorded. The null stream is the legacy one.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

struct CUgraph_st {
  std::vector<cuda_host::Launch> launches;
};

struct CUgraphExec_st : CUgraph_st {};

struct CUstream_st {
  std::unique_ptr<CUgraph_st> recorded;  // null: not capturing
};

using namespace cuda_host;

namespace cuda_host {

bool is_capturing(cudaStream_t stream) { return stream != nullptr && stream->recorded != nullptr; }

cudaError_t record(const Launch& launch, cudaStream_t capturing) {
  capturing->recorded->launches.push_back(launch);
  return cudaSuccess;
}

}  // namespace cuda_host

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || is_capturing(stream)) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  stream->recorded = std::make_unique<CUgraph_st>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!is_capturing(stream)) {
    return remember(cudaErrorInvalidValue);
  }
  *graph = stream->recorded.release();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{*graph};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (is_capturing(stream)) {
    return remember(cudaErrorStreamCaptureUnsupported);  // a GPU can: a graph within a graph
  }
  log(0, 0, "graph of " + std::to_string(executable->launches.size()) + " launches");
  for (const Launch& launch : executable->launches) {
    if (const cudaError_t error = run(launch); error != cudaSuccess) {
      return remember(error);
    }
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
