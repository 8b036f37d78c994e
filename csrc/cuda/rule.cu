// From token statistics to α and the weight of every row, in one launch (eq. 3, 6, 7): a block a question.
//
// The block's threads are shared out among as many rationales as there are, whole warps each, and meet at three
// points: the metrics of every rationale, α, and the rows' weights. What is decided lies in the outputs themselves,
// which the block reads back. The order of every sum depends on nothing but the lengths.
#include "common.h"

namespace compact {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct RuleCall {
  const float* logprob;
  const float* evidence;
  const int64_t* targets;
  const uint8_t* thinking;
  const int32_t* cu_questions;
  const int32_t* cu_rows;
  const int32_t* body;
  const float* consensus;  // or null
  const float* reference;  // or null
  const float* weights;    // or null
  const float* normalizer;
  float* alpha;
  float* adaptability;
  float* difficulty;
  float* counted;
  float* row_weight;
  int64_t first_question;
  int64_t ignore_index;
  float beta_adaptability, beta_consensus, beta_difficulty, temperature, epsilon;
  bool body_only, per_body_token, per_target;
};

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Mean, and standard deviation around it, of a question's metric: one warp. The mean rounds at the size of the values,
// which may be far more than their spread: what is left of it is taken away, `correction`.
struct Spread {
  float mean, correction, std;
  __device__ float zscore(float value) const {
    const bool flat = std <= 1e-6f * fmaxf(fabsf(mean), 1.0f);
    return flat ? 0.0f : (value - mean - correction) / std;
  }
};

__device__ Spread spread_of(const float* values, int count, int lane) {
  Spread spread;
  float sum = 0;
  for (int k = lane; k < count; k += 32) sum += values[k];
  spread.mean = warp_sum(sum) / count;
  sum = 0;
  for (int k = lane; k < count; k += 32) sum += values[k] - spread.mean;
  spread.correction = warp_sum(sum) / count;
  sum = 0;
  for (int k = lane; k < count; k += 32) {
    const float centred = values[k] - spread.mean - spread.correction;
    sum += centred * centred;
  }
  spread.std = sqrtf(warp_sum(sum) / count);
  return spread;
}

// α of a question's rationales: one warp. `score` may be `alpha`.
__device__ void softmax_of_scores(const RuleCall& call, int first, int count, int lane) {
  Spread adaptability{}, consensus{}, difficulty{};
  // A metric that nobody weighs may be infinite: it is not looked at.
  if (call.beta_adaptability != 0) adaptability = spread_of(call.adaptability + first, count, lane);
  if (call.beta_difficulty != 0) difficulty = spread_of(call.difficulty + first, count, lane);
  const bool weighs_consensus = call.consensus != nullptr && call.beta_consensus != 0;
  if (weighs_consensus) consensus = spread_of(call.consensus + first, count, lane);
  float top = -INFINITY;
  for (int k = lane; k < count; k += 32) {
    float score = 0;
    if (call.beta_adaptability != 0) {
      score += call.beta_adaptability * adaptability.zscore(call.adaptability[first + k]);
    }
    if (call.beta_difficulty != 0) score -= call.beta_difficulty * difficulty.zscore(call.difficulty[first + k]);
    if (weighs_consensus) score += call.beta_consensus * consensus.zscore(call.consensus[first + k]);
    score /= call.temperature;
    call.alpha[first + k] = score;  // read back by this lane alone
    top = fmaxf(top, score);
  }
  top = warp_max(top);
  float sum = 0;
  for (int k = lane; k < count; k += 32) {
    const float weight = expf(call.alpha[first + k] - top);
    call.alpha[first + k] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  for (int k = lane; k < count; k += 32) call.alpha[first + k] /= sum;
}

__global__ void __launch_bounds__(kThreads) rule_kernel(RuleCall call) {
  __shared__ float partial[kWarps][3];
  const int64_t question = call.first_question + blockIdx.x;
  const int first = call.cu_questions[question];
  const int count = call.cu_questions[question + 1] - first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int share = kWarps;  // warps of a rationale: a power of two
  while (share > 1 && share * count > kWarps) share /= 2;
  const int together = kWarps / share;  // rationales at a time
  const int thread = threadIdx.x % (share * 32), threads = share * 32;

  for (int batch = 0; batch < count; batch += together) {
    const int k = batch + warp / share;
    float jumps = 0, losses = 0, counts = 0;
    if (k < count) {
      const int64_t start = call.cu_rows[first + k];
      const int length = static_cast<int>(call.cu_rows[first + k + 1] - start);
      const int last = call.body_only ? min(length - 1, call.body[first + k]) : length - 1;  // whose jump counts
      for (int step = thread; step < length; step += threads) {
        const int64_t row = start + step;
        if (call.targets[row] != call.ignore_index) {
          losses -= call.logprob[row];
          counts += 1;
        }
        if (step >= 1 && step <= last) {
          float jump = call.evidence[row] - call.evidence[row - 1];
          jump = jump < 0 ? 0.0f : jump;  // a NaN stays one
          jumps += call.thinking[row] ? jump : jump * call.epsilon;
        }
      }
    }
    jumps = warp_sum(jumps), losses = warp_sum(losses), counts = warp_sum(counts);
    if (lane == 0) partial[warp][0] = jumps, partial[warp][1] = losses, partial[warp][2] = counts;
    __syncthreads();
    if (k < count && thread == 0) {
      jumps = losses = counts = 0;
      for (int other = warp; other < warp + share; ++other) {
        jumps += partial[other][0], losses += partial[other][1], counts += partial[other][2];
      }
      if (call.per_body_token) jumps /= max(call.body[first + k], 1);
      losses /= fmaxf(counts, 1.0f);
      if (call.reference != nullptr) losses /= call.reference[first + k];
      call.adaptability[first + k] = jumps;
      call.difficulty[first + k] = losses;
      call.counted[first + k] = counts;
      if (call.weights != nullptr) call.alpha[first + k] = call.weights[first + k];
    }
    __syncthreads();
  }
  if (call.weights == nullptr && warp == 0) softmax_of_scores(call, first, count, lane);
  __syncthreads();

  const float normalizer = *call.normalizer;
  for (int k = warp / share; k < count; k += together) {
    float weight = call.alpha[first + k] * normalizer;
    if (call.per_target) weight /= fmaxf(call.counted[first + k], 1.0f);
    const int64_t end = call.cu_rows[first + k + 1];
    for (int64_t row = call.cu_rows[first + k] + thread; row < end; row += threads) call.row_weight[row] = weight;
  }
}

}  // namespace

Tensor decide_questions(
    Tensor logprob, Tensor evidence, Tensor targets, Tensor thinking, Tensor cu_questions, Tensor cu_rows, Tensor body,
    std::optional<Tensor> consensus, std::optional<Tensor> reference, std::optional<Tensor> weights,
    Tensor normalizer, Tensor alpha, Tensor adaptability, Tensor difficulty, Tensor counted, Tensor row_weight,
    int64_t first_question, int64_t last_question, int64_t ignore_index, double beta_adaptability,
    double beta_consensus, double beta_difficulty, double temperature, double epsilon, bool body_only,
    bool per_body_token, bool per_target) {
  const int32_t device = logprob.get_device_index();
  const int64_t rows = logprob.numel(), rationales = body.numel();
  Check check;
  check(
      0 <= first_question && first_question <= last_question && last_question < cu_questions.numel(),
      "questions ", first_question, " to ", last_question, " of ", cu_questions.numel() - 1);
  RuleCall call{};
  call.logprob = data_of<float>(check, logprob, rows, device, "logprob");
  call.evidence = data_of<float>(check, evidence, rows, device, "evidence");
  call.targets = data_of<int64_t>(check, targets, rows, device, "targets");
  call.thinking = data_of<uint8_t>(check, thinking, rows, device, "thinking");
  call.cu_questions = data_of<int32_t>(check, cu_questions, 1, device, "cu_questions");
  call.cu_rows = data_of<int32_t>(check, cu_rows, rationales + 1, device, "cu_rows");
  call.body = data_of<int32_t>(check, body, rationales, device, "body_lengths");
  call.consensus = consensus ? data_of<float>(check, *consensus, rationales, device, "consensus") : nullptr;
  call.reference = reference ? data_of<float>(check, *reference, rationales, device, "difficulty_reference") : nullptr;
  call.weights = weights ? data_of<float>(check, *weights, rationales, device, "weights") : nullptr;
  call.normalizer = data_of<float>(check, normalizer, 1, device, "normalizer");
  call.alpha = data_of<float>(check, alpha, rationales, device, "alpha");
  call.adaptability = data_of<float>(check, adaptability, rationales, device, "adaptability");
  call.difficulty = data_of<float>(check, difficulty, rationales, device, "difficulty");
  call.counted = data_of<float>(check, counted, rationales, device, "targets_per_rationale");
  call.row_weight = data_of<float>(check, row_weight, rows, device, "row_weight");
  call.first_question = first_question;
  call.ignore_index = ignore_index;
  call.beta_adaptability = static_cast<float>(beta_adaptability);
  call.beta_consensus = static_cast<float>(beta_consensus);
  call.beta_difficulty = static_cast<float>(beta_difficulty);
  call.temperature = static_cast<float>(temperature);
  call.epsilon = static_cast<float>(epsilon);
  call.body_only = body_only;
  call.per_body_token = per_body_token;
  call.per_target = per_target;
  if (check.failed() || first_question == last_question) return check.answer();
  const OnDevice guard(device);
  const cudaStream_t stream = current_stream(check, device);
  if (check.failed()) return check.answer();
  rule_kernel<<<static_cast<unsigned>(last_question - first_question), kThreads, 0, stream>>>(call);
  check_launch(check, "decide_questions");
  return check.answer();
}

std::string cuda_trouble(int64_t device) {
  const OnDevice guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, rule_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is told, not left for others to find
  return cudaGetErrorString(error);
}

}  // namespace compact
