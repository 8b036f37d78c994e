// Eq. 9 and MIND's JSD on rows of unnormalised probabilities: the value, and the gradient in place. The mathematics
// is that of compact_kernels/divergence_kernels.py: of a question, the rationales whose answer spans have one length
// form a class, and all rows of a class at one position are worked on together, block of vocabulary by block.
#include "../ops.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace compact {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kColumns = 512;  // a block, of every row of the class
constexpr float kTiny = 1.17549435e-38f;

struct Position {  // of a class
  int64_t question;
  std::vector<int64_t> members;  // rationales
  int64_t length;                // of their spans
  int64_t step;                  // 0 … length − 1
};

struct DivergenceCall {
  float* rows;  // (n, V)
  int64_t stride, vocabulary;
  const float* sums;
  const int32_t* cu_span;
  const float* alpha;
  int64_t first_row;
  bool jsd;
  float* scores;
  const float* gain;  // null: the value is asked for
};

// p and log p, then t (in place of log p) of every row over a block; for eq. 9 also Σ α (p − p of the heaviest).
COMPACT_INLINE void probabilities_and_t(
    const DivergenceCall& call, const Position& place, int64_t first, int64_t count, float total_weight,
    int64_t heaviest, float* p, float* t, float* other, float* mixed) {
  const int64_t members = static_cast<int64_t>(place.members.size());
  for (int64_t i = 0; i < count; ++i) mixed[i] = 0;
  for (int64_t k = 0; k < members; ++k) {
    const int64_t row = call.cu_span[place.members[k]] + place.step - call.first_row;
    const float* e = call.rows + row * call.stride + first;
    const float inverse = 1.0f / call.sums[row], log_sum = std::log(call.sums[row]);
    float *p_k = p + k * kColumns, *t_k = t + k * kColumns;
    for (int64_t i = 0; i < count; ++i) {
      p_k[i] = e[i] * inverse;
      t_k[i] = log(e[i] < kTiny ? kTiny : e[i]) - log_sum;
    }
  }
  if (!call.jsd) {  // relative to the heaviest rationale, whose own term is all rounding otherwise
    const float* p_most = p + heaviest * kColumns;
    std::copy_n(t + heaviest * kColumns, count, other);
    for (int64_t k = 0; k < members; ++k) {
      for (int64_t i = 0; i < count; ++i) t[k * kColumns + i] -= other[i];
    }
    std::fill_n(other, count, 0.0f);
    for (int64_t k = 0; k < members; ++k) {
      const float weight = call.alpha[place.members[k]];
      const float *p_k = p + k * kColumns, *t_k = t + k * kColumns;
      for (int64_t i = 0; i < count; ++i) {
        other[i] += weight * t_k[i];
        mixed[i] += weight * (p_k[i] - p_most[i]);
      }
    }
    for (int64_t k = 0; k < members; ++k) {
      for (int64_t i = 0; i < count; ++i) t[k * kColumns + i] = total_weight * t[k * kColumns + i] - other[i];
    }
    return;
  }
  for (int64_t k = 0; k < members; ++k) {
    float *p_k = p + k * kColumns, *t_k = t + k * kColumns;
    for (int64_t i = 0; i < count; ++i) other[i] = 0;
    for (int64_t j = 0; j < members; ++j) {
      if (j == k) continue;  // log(2p / 2p)
      const float weight = 0.5f * call.alpha[place.members[j]];
      const float* p_j = p + j * kColumns;
      for (int64_t i = 0; i < count; ++i) {
        const float mean = 0.5f * (p_k[i] + p_j[i]);
        other[i] += weight * (t_k[i] - log(mean < kTiny ? kTiny : mean));
      }
    }
    for (int64_t i = 0; i < count; ++i) t_k[i] = other[i];
  }
}

COMPACT_INLINE void positions_of(
    const DivergenceCall& call, const std::vector<Position>& positions, int64_t begin, int64_t end) {
  std::vector<float> room;
  std::vector<double> score;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Position& place = positions[unit];
    const int64_t members = static_cast<int64_t>(place.members.size());
    room.resize((2 * members + 2) * kColumns);
    float *p = room.data(), *t = p + members * kColumns, *other = t + members * kColumns, *mixed = other + kColumns;
    score.assign(members, 0.0);
    float total_weight = 0;
    int64_t heaviest = 0;
    for (int64_t k = 0; k < members; ++k) {
      total_weight += call.alpha[place.members[k]];
      if (call.alpha[place.members[k]] > call.alpha[place.members[heaviest]]) heaviest = k;
    }
    const float *p_most = p + heaviest * kColumns, apart = call.jsd ? 0.0f : total_weight;
    for (int64_t first = 0; first < call.vocabulary; first += kColumns) {
      const int64_t count = std::min(kColumns, call.vocabulary - first);
      probabilities_and_t(call, place, first, count, total_weight, heaviest, p, t, other, mixed);
      for (int64_t k = 0; k < members; ++k) {
        const float *p_k = p + k * kColumns, *t_k = t + k * kColumns;
        const int64_t entry = call.cu_span[place.members[k]] + place.step;
        if (call.gain == nullptr) {
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < count; ++i) sum += p_k[i] * t_k[i];
          score[k] += sum;
          continue;
        }
        float* out = call.rows + (entry - call.first_row) * call.stride + first;
        const float gain = call.gain[place.members[k]] / static_cast<float>(place.length);
        const float own_score = call.scores[entry];
        for (int64_t i = 0; i < count; ++i) {
          out[i] = gain * (p_k[i] * (t_k[i] - own_score) + (apart * (p_k[i] - p_most[i]) - mixed[i]));
        }
      }
    }
    if (call.gain == nullptr) {
      for (int64_t k = 0; k < members; ++k) {
        call.scores[call.cu_span[place.members[k]] + place.step] = static_cast<float>(score[k]);
      }
    }
  }
}

// Every position of every class of two rationales or more.
std::vector<Position> positions_of_questions(
    const int32_t* cu_questions, const int32_t* cu_span, int64_t first_question, int64_t last_question) {
  std::vector<Position> found;
  for (int64_t question = first_question; question < last_question; ++question) {
    std::vector<bool> seen(cu_questions[question + 1] - cu_questions[question]);
    for (int64_t lead = cu_questions[question]; lead < cu_questions[question + 1]; ++lead) {
      const int64_t length = cu_span[lead + 1] - cu_span[lead];
      if (seen[lead - cu_questions[question]] || length == 0) continue;
      std::vector<int64_t> members;
      for (int64_t other = lead; other < cu_questions[question + 1]; ++other) {
        if (cu_span[other + 1] - cu_span[other] != length) continue;
        members.push_back(other);
        seen[other - cu_questions[question]] = true;
      }
      if (members.size() < 2) continue;
      for (int64_t step = 0; step < length; ++step) found.push_back({question, members, length, step});
    }
  }
  return found;
}

float* checked(Check& check, const Tensor& tensor, int64_t count, const char* name) {
  check(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() >= count, name, " has ",
      count, " entries at least, contiguous, float32");
  return check.failed() ? nullptr : static_cast<float*>(tensor.data_ptr());
}

}  // namespace

Tensor answer_divergence(
    Tensor rows, Tensor sums, Tensor cu_questions, Tensor cu_span, Tensor alpha, int64_t first_question,
    int64_t last_question, int64_t first_row, bool jsd, Tensor per_question, Tensor scores,
    std::optional<Tensor> gain) {
  Check check;
  check(
      rows.scalar_type() == ScalarType::Float && rows.dim() == 2 && (rows.size(1) == 1 || rows.stride(1) == 1),
      "rows are float32, (n, V), a row's side by side");
  check(
      0 <= first_question && first_question <= last_question && last_question < cu_questions.numel(), "questions ",
      first_question, " to ", last_question, " of ", cu_questions.numel() - 1);
  check(0 <= first_row && first_row <= INT32_MAX, "first_row is ", first_row);
  if (check.failed()) return check.answer();
  const int64_t rationales = cu_span.numel() - 1;
  const int32_t* questions =
      offsets_of(check, cu_questions, first_question, last_question, 0, rationales, "cu_questions");
  if (check.failed()) return check.answer();
  DivergenceCall call{};
  call.rows = static_cast<float*>(rows.mutable_data_ptr());
  call.stride = rows.stride(0);
  call.vocabulary = rows.size(1);
  call.sums = checked(check, sums, rows.size(0), "sums");
  call.cu_span = offsets_of(
      check, cu_span, questions[first_question], questions[last_question], first_row, first_row + rows.size(0),
      "cu_span");
  if (check.failed()) return check.answer();
  call.alpha = checked(check, alpha, rationales, "alpha");
  call.first_row = first_row;
  call.jsd = jsd;
  const int64_t last_row = call.cu_span[questions[last_question]];
  call.scores = checked(check, scores, last_row, "scores");
  call.gain = gain ? checked(check, *gain, rationales, "gain") : nullptr;
  float* values = checked(check, per_question, last_question, "per_question");
  if (check.failed()) return check.answer();

  const std::vector<Position> positions = positions_of_questions(questions, call.cu_span, first_question, last_question);
  if (gain) {  // rows without a partner have no gradient
    std::vector<bool> paired(last_row - first_row);
    for (const Position& place : positions) {
      for (const int64_t member : place.members) paired[call.cu_span[member] + place.step - first_row] = true;
    }
    for (int64_t row = 0; row < last_row - first_row; ++row) {
      if (!paired[row]) std::fill_n(call.rows + row * call.stride, call.vocabulary, 0.0f);
    }
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(positions.size()), 1, [&](int64_t begin, int64_t end) {
    vectorised(
        [](const auto&... arguments) COMPACT_INLINED { positions_of(arguments...); }, call, positions, begin, end);
  });
  if (gain) return check.answer();
  std::fill(values + first_question, values + last_question, 0.0f);
  for (const Position& place : positions) {
    for (const int64_t member : place.members) {
      values[place.question] +=
          call.alpha[member] * call.scores[call.cu_span[member] + place.step] / static_cast<float>(place.length);
    }
  }
  return check.answer();
}

}  // namespace compact
