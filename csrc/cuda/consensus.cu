// Eq. 4–5 in one launch: the weighted in-degree of every rationale in the graph of its question, a block a question.
//
// A warp takes a head and a rationale i: scores of q_i with all keys, softmax over them, added to its own sums without
// the entry of i itself. The sums of the warps are added in their order: two launches agree to the last bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"

namespace compact {
namespace {

constexpr int kMostWarps = 16;
constexpr int64_t kFloats = 12288;  // of shared memory, the 48 KiB that need no asking

struct ConsensusCall {
  const void* query;
  const void* key;
  const int32_t* cu_questions;
  float* degree;
  int64_t query_stride, query_head_stride, key_stride, key_head_stride;
  float scale;
  int heads, width, most;
};

__device__ float wide(float x) { return x; }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float wide(__half x) { return __half2float(x); }

template <class T>
__global__ void consensus_kernel(ConsensusCall call) {
  extern __shared__ float shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  float* degree = shared + static_cast<int64_t>(warp) * 2 * call.most;
  float* score = degree + call.most;
  const int64_t first = call.cu_questions[blockIdx.x];
  const int count = static_cast<int>(call.cu_questions[blockIdx.x + 1] - first);
  for (int k = lane; k < count; k += 32) degree[k] = 0;
  __syncwarp();
  for (int pair = warp; pair < call.heads * count; pair += warps) {
    const int head = pair / count, i = pair % count;
    const T* q = static_cast<const T*>(call.query) + (first + i) * call.query_stride + head * call.query_head_stride;
    float top = -INFINITY;
    for (int k = 0; k < count; ++k) {
      const T* other = static_cast<const T*>(call.key) + (first + k) * call.key_stride + head * call.key_head_stride;
      float dot = 0;
      for (int d = lane; d < call.width; d += 32) dot += wide(q[d]) * wide(other[d]);
      for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
      dot *= call.scale;
      if (lane == 0) score[k] = dot;
      top = fmaxf(top, dot);
    }
    __syncwarp();
    float sum = 0;
    for (int k = lane; k < count; k += 32) sum += expf(score[k] - top);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    for (int k = lane; k < count; k += 32) {
      if (k != i) degree[k] += expf(score[k] - top) / sum;
    }
    __syncwarp();
  }
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    float sum = 0;
    for (int other = 0; other < warps; ++other) sum += shared[static_cast<int64_t>(other) * 2 * call.most + k];
    call.degree[first + k] = sum / call.heads;
  }
}

}  // namespace

Tensor question_in_degree(
    Tensor query, Tensor key, Tensor cu_questions, double scale, int64_t most_rationales, Tensor degree) {
  using torch::headeronly::ScalarType;
  const int32_t device = query.get_device_index();
  const int64_t questions = cu_questions.numel() - 1;
  const ScalarType dtype = query.scalar_type();
  Check check;
  for (const Tensor* tensor : {&query, &key}) {
    if (!check(
            tensor->is_cuda() && tensor->get_device_index() == device && tensor->dim() == 3 &&
                tensor->stride(2) == 1 && tensor->size(0) == query.size(0) && tensor->size(1) == query.size(1) &&
                tensor->size(2) == query.size(2) && tensor->scalar_type() == dtype,
            "query and key are (S, H, d), alike, a vector's numbers side by side")) {
      return check.answer();
    }
  }
  check(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "query and key are float32, bfloat16 or float16");
  check(0 < most_rationales && 2 * most_rationales <= kFloats, "at most ", kFloats / 2, " rationales");
  ConsensusCall call{};
  if (check.failed()) return check.answer();
  call.query = query.data_ptr();
  call.key = key.data_ptr();
  call.cu_questions = data_of<int32_t>(check, cu_questions, 1, device, "cu_questions");
  call.degree = data_of<float>(check, degree, query.size(0), device, "degree");
  call.query_stride = query.stride(0), call.query_head_stride = query.stride(1);
  call.key_stride = key.stride(0), call.key_head_stride = key.stride(1);
  call.scale = static_cast<float>(scale);
  call.heads = static_cast<int>(query.size(1));
  call.width = static_cast<int>(query.size(2));
  call.most = static_cast<int>(most_rationales);
  if (check.failed() || questions == 0) return check.answer();
  const int64_t fit = kFloats / (2 * most_rationales);
  const int warps = static_cast<int>(fit < kMostWarps ? fit : kMostWarps);
  const size_t bytes = static_cast<size_t>(warps) * 2 * most_rationales * sizeof(float);
  const OnDevice guard(device);
  const cudaStream_t stream = current_stream(check, device);
  if (check.failed()) return check.answer();
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(questions), warps * 32, bytes, stream>>>(call);
  };
  switch (dtype) {
    case ScalarType::Float: launch(consensus_kernel<float>); break;
    case ScalarType::BFloat16: launch(consensus_kernel<__nv_bfloat16>); break;
    default: launch(consensus_kernel<__half>);
  }
  check_launch(check, "question_in_degree");
  return check.answer();
}

}  // namespace compact
