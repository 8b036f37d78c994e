// What registration.cpp registers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

namespace compact {

using torch::stable::Tensor;

// What an op asks of its arguments, and its answer: why it refuses them, as bytes on the CPU; none if it does not.
//
// An op answers because it had better not throw. On one machine (torch 2.11 for CUDA) every exception out of the
// library ended the process, on others none did. What differs is the C++ runtime: torch's wheels export parts of
// theirs (the constructor and str() of the streams that word an error among them), a library built beside them binds
// to those, and the rest of it comes from wherever it runs. Without throws and streams that does not matter;
// compact_kernels.native.run raises what an op answers.
class Check {
 public:
  // Whether this and all before it hold. What does not is worded from the parts, the first time.
  template <class... Parts>
  bool operator()(bool holds, const Parts&... parts) {
    if (!holds && words_.empty()) ((words_ += word(parts)), ...);
    return words_.empty();
  }

  bool failed() const { return !words_.empty(); }

  Tensor answer() const {
    const int64_t size = static_cast<int64_t>(words_.size()), stride = 1;
    AtenTensorHandle handle = nullptr;  // not by the dispatcher, which takes several times as long
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle));
    Tensor bytes(handle);
    if (size > 0) std::memcpy(bytes.mutable_data_ptr(), words_.data(), words_.size());
    return bytes;
  }

 private:
  static std::string word(const char* text) { return text; }
  static std::string word(int64_t number) { return std::to_string(number); }

  std::string words_;
};

// int32 offsets on the CPU, of which entries first … last run upwards from `least` and end at `most` at the latest;
// null if they do not.
inline const int32_t* offsets_of(
    Check& check, const Tensor& tensor, int64_t first, int64_t last, int64_t least, int64_t most, const char* name) {
  if (!check(
          tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.is_contiguous() &&
              tensor.numel() > last,
          name, " are int32, contiguous, at least ", last + 1)) {
    return nullptr;
  }
  const int32_t* offsets = tensor.const_data_ptr<int32_t>();
  for (int64_t i = first; i <= last; ++i) {
    if (!check(
            offsets[i] >= least && offsets[i] <= most, name, " are not offsets: ", name, "[", i, "] is ", offsets[i],
            ", not within ", least, " to ", most)) {
      return nullptr;
    }
    least = offsets[i];
  }
  return offsets;
}

Tensor row_statistics(
    Tensor z, Tensor targets, std::optional<Tensor> bias, std::optional<Tensor> answer_ids,
    std::optional<Tensor> cu_answers, std::optional<Tensor> cu_rows, double inner, double outer, int64_t ignore_index,
    Tensor table, int64_t first_row, bool store);

Tensor gradient_block(
    Tensor z, Tensor targets, std::optional<Tensor> bias, double inner, double outer, Tensor pivot, Tensor slope,
    std::optional<Tensor> curve, Tensor target_gradient, int64_t first_column);

Tensor answer_divergence(
    Tensor rows, Tensor sums, Tensor cu_questions, Tensor cu_span, Tensor alpha, int64_t first_question,
    int64_t last_question, int64_t first_row, bool jsd, Tensor per_question, Tensor scores,
    std::optional<Tensor> gain);

std::string cpu_capability();

// The CUDA part, where it is built.

Tensor decide_questions(
    Tensor logprob, Tensor evidence, Tensor targets, Tensor thinking, Tensor cu_questions, Tensor cu_rows, Tensor body,
    std::optional<Tensor> consensus, std::optional<Tensor> reference, std::optional<Tensor> weights,
    Tensor normalizer, Tensor alpha, Tensor adaptability, Tensor difficulty, Tensor counted, Tensor row_weight,
    int64_t first_question, int64_t last_question, int64_t ignore_index, double beta_adaptability,
    double beta_consensus, double beta_difficulty, double temperature, double epsilon, bool body_only,
    bool per_body_token, bool per_target);

Tensor question_in_degree(
    Tensor query, Tensor key, Tensor cu_questions, double scale, int64_t most_rationales, Tensor degree);

std::string cuda_trouble(int64_t device);

}  // namespace compact
