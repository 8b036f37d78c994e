// What registration.cpp registers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace compact {

using torch::stable::Tensor;

// int32 offsets on the CPU, of which entries first … last run upwards from `least` and end at `most` at the latest.
inline const int32_t* offsets_of(
    const Tensor& tensor, int64_t first, int64_t last, int64_t least, int64_t most, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.is_contiguous() && tensor.numel() > last,
      name, " are int32, contiguous, at least ", last + 1);
  const int32_t* offsets = tensor.const_data_ptr<int32_t>();
  for (int64_t i = first; i <= last; ++i) {
    STD_TORCH_CHECK(
        offsets[i] >= least && offsets[i] <= most, name, " are not offsets: ", name, "[", i, "] is ", offsets[i],
        ", not within ", least, " to ", most);
    least = offsets[i];
  }
  return offsets;
}

void row_statistics(
    Tensor z, Tensor targets, std::optional<Tensor> bias, std::optional<Tensor> answer_ids,
    std::optional<Tensor> cu_answers, std::optional<Tensor> cu_rows, double inner, double outer, int64_t ignore_index,
    Tensor table, int64_t first_row, bool store);

void gradient_block(
    Tensor z, Tensor targets, std::optional<Tensor> bias, double inner, double outer, Tensor pivot, Tensor slope,
    std::optional<Tensor> curve, Tensor target_gradient, int64_t first_column);

void answer_divergence(
    Tensor rows, Tensor sums, Tensor cu_questions, Tensor cu_span, Tensor alpha, int64_t first_question,
    int64_t last_question, int64_t first_row, bool jsd, Tensor per_question, Tensor scores,
    std::optional<Tensor> gain);

std::string cpu_capability();

// The CUDA part, where it is built.

void decide_questions(
    Tensor logprob, Tensor evidence, Tensor targets, Tensor thinking, Tensor cu_questions, Tensor cu_rows, Tensor body,
    std::optional<Tensor> consensus, std::optional<Tensor> reference, std::optional<Tensor> weights,
    Tensor normalizer, Tensor alpha, Tensor adaptability, Tensor difficulty, Tensor counted, Tensor row_weight,
    int64_t first_question, int64_t last_question, int64_t ignore_index, double beta_adaptability,
    double beta_consensus, double beta_difficulty, double temperature, double epsilon, bool body_only,
    bool per_body_token, bool per_target);

void question_in_degree(
    Tensor query, Tensor key, Tensor cu_questions, double scale, int64_t most_rationales, Tensor degree);

std::string cuda_trouble(int64_t device);

}  // namespace compact
