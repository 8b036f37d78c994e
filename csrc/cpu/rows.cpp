// The head's row pass on CPUs: from a chunk of logits to the statistics of each row and its unnormalised gradient,
// in place, with one exponential a logit. A row is read twice (its maximum first), the second time from the cache.
//
// Sums run over v ≠ target, so that a confident token loses nothing to cancellation; those of a block are float32,
// those of blocks double. A logit is z = (raw + bias)·inner, or with a softcap tanh((raw + bias)·inner)·outer.
#include "../ops.h"
#include "vector.h"

#include <algorithm>
#include <cmath>

namespace compact {
namespace {

using torch::headeronly::ScalarType;

struct Head {
  const float* bias;  // or null
  float inner;
  float outer;  // 0: no softcap
};

// A block of logits; with a softcap also dz/draw without its constant factor.
template <class T, bool CAPPED>
COMPACT_INLINE void logits(const T* raw, const Head& head, int64_t first, int64_t count, float* z, float* slope) {
  load(raw + first, count, z);
  if (head.bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) z[i] += head.bias[first + i];
  }
  if constexpr (CAPPED) {
    for (int64_t i = 0; i < count; ++i) {
      const float t = tanh(z[i] * head.inner);
      z[i] = t * head.outer;
      slope[i] = 1.0f - t * t;
    }
  } else if (head.inner != 1.0f) {
    for (int64_t i = 0; i < count; ++i) z[i] *= head.inner;
  }
}

template <class T, bool CAPPED>
COMPACT_INLINE float one_logit(const T* raw, const Head& head, int64_t column, float* slope) {
  float z = value(raw[column]) + (head.bias == nullptr ? 0.0f : head.bias[column]);
  z *= head.inner;
  *slope = 1.0f;
  if constexpr (CAPPED) {
    const float t = tanh(z);
    *slope = 1.0f - t * t;
    z = t * head.outer;
  }
  asm("" : "+m"(z));  // rounded as in a block, not fused with what is subtracted: the maximum less itself is 0
  return z;
}

struct StatisticsCall {
  void* z;
  int64_t stride, vocabulary;
  Head head;
  const int64_t* targets;
  int64_t ignore_index;
  const int64_t* answer_ids;  // or null
  const int32_t* cu_answers;
  const int32_t* cu_rows;
  int64_t num_rationales, first_row;
  float* table;  // from the chunk's first column on
  int64_t table_stride;
  bool store;
};

template <class T, bool CAPPED>
COMPACT_INLINE void statistics_of_row(const StatisticsCall& call, int64_t row) {
  T* raw = static_cast<T*>(call.z) + row * call.stride;
  const bool counted = call.targets[row] != call.ignore_index;
  const int64_t column = counted ? call.targets[row] : 0;
  float z[kBlock], slope[CAPPED ? kBlock : 1];

  float pivot = -INFINITY;
  for (int64_t first = 0; first < call.vocabulary; first += kBlock) {
    const int64_t count = std::min(kBlock, call.vocabulary - first);
    logits<T, CAPPED>(raw, call.head, first, count, z, slope);
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) most = z[i] > most ? z[i] : most;
    pivot = most > pivot ? most : pivot;
  }

  float target_slope, ignored_slope;
  const float u_target = one_logit<T, CAPPED>(raw, call.head, column, &target_slope) - pivot;
  double evidence = 0;
  int64_t asked = 0;
  if (call.answer_ids != nullptr) {
    const int32_t* ends = call.cu_rows + 1;  // the row's rationale: the first one that ends after it
    const int64_t owner = std::upper_bound(ends, ends + call.num_rationales, call.first_row + row) - ends;
    if (owner < call.num_rationales) {
      const int32_t last = call.cu_answers[owner + 1];
      for (int32_t i = call.cu_answers[owner]; i < last; ++i, ++asked) {
        evidence += one_logit<T, CAPPED>(raw, call.head, call.answer_ids[i], &ignored_slope) - pivot;
      }
    }
  }

  double others_sum = 0, squares_sum = 0, weighted_sum = 0;  // over v ≠ target: Σ E, Σ E², Σ E·u
  for (int64_t first = 0; first < call.vocabulary; first += kBlock) {
    const int64_t count = std::min(kBlock, call.vocabulary - first);
    logits<T, CAPPED>(raw, call.head, first, count, z, slope);
    // One comparison: with two, gcc 12 splits the loop at the target and vectorises neither part.
    const auto at_column = static_cast<uint64_t>(column - first);
    if (at_column < static_cast<uint64_t>(count)) z[at_column] = -INFINITY;
    float sum = 0, squares = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, squares, weighted)
    for (int64_t i = 0; i < count; ++i) {
      const float u = z[i] - pivot;
      const float e = exp_or_zero(u);
      sum += e;
      squares += e * e;
      weighted += e * (u < kUnderflow ? kUnderflow : u);
      z[i] = e;
    }
    others_sum += sum;
    squares_sum += squares;
    weighted_sum += weighted;
    if (call.store) {
      if constexpr (CAPPED) {
        for (int64_t i = 0; i < count; ++i) z[i] *= slope[i];
      }
      store(z, count, raw + first);
    }
  }

  const double target_mass = std::exp(static_cast<double>(u_target));
  const double total = others_sum + target_mass;
  // Where the target is the maximum its mass is 1, and what the others add to it may be below its rounding.
  const double log_total = u_target == 0 ? std::log1p(others_sum) : std::log(total);
  const double others = others_sum / total;
  const double at_target = target_mass > 0 ? target_mass * u_target : 0.0;
  const double logprob = u_target - log_total;
  if (call.store) assign(raw[column], static_cast<float>(-others_sum) * target_slope);
  const double fields[] = {
      counted ? logprob : 0.0,
      log_total - (weighted_sum + at_target) / total,
      asked > 0 ? evidence / asked - log_total : 0.0,
      counted ? std::sqrt(others_sum * others_sum + squares_sum) / total : 0.0,
      others,
      counted ? 1.0 / total : 0.0,
      pivot,
      total,
      target_mass,
      target_slope,
  };
  for (int64_t field = 0; field < 10; ++field) {
    call.table[field * call.table_stride + row] = static_cast<float>(fields[field]);
  }
}

struct GradientCall {
  void* z;
  int64_t stride, width;
  Head head;
  const int64_t* targets;
  const float* pivot;
  const float* slope;
  const float* curve;  // or null
  const float* target_gradient;
  int64_t first_column;
};

template <class T, bool CAPPED>
COMPACT_INLINE void gradient_of_row(const GradientCall& call, int64_t row) {
  T* raw = static_cast<T*>(call.z) + row * call.stride;
  const float pivot = call.pivot[row], factor = call.slope[row];
  const float curve = call.curve == nullptr ? 0.0f : call.curve[row];
  float z[kBlock], slope[CAPPED ? kBlock : 1];
  for (int64_t first = 0; first < call.width; first += kBlock) {
    const int64_t count = std::min(kBlock, call.width - first);
    logits<T, CAPPED>(raw, call.head, first, count, z, slope);
    for (int64_t i = 0; i < count; ++i) {
      const float u = z[i] - pivot;
      z[i] = exp_or_zero(u) * (factor + curve * (u < kUnderflow ? kUnderflow : u));
    }
    if constexpr (CAPPED) {
      for (int64_t i = 0; i < count; ++i) z[i] *= slope[i];
    }
    store(z, count, raw + first);
  }
  const uint64_t column = static_cast<uint64_t>(call.targets[row]) - static_cast<uint64_t>(call.first_column);
  if (column < static_cast<uint64_t>(call.width)) assign(raw[column], call.target_gradient[row]);
}

template <class T, bool CAPPED>
COMPACT_INLINE void rows_of(const StatisticsCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) statistics_of_row<T, CAPPED>(call, row);
}

template <class T, bool CAPPED>
COMPACT_INLINE void rows_of(const GradientCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) gradient_of_row<T, CAPPED>(call, row);
}

template <class T, bool CAPPED, class Call>
void in_parallel(const Call& call, int64_t rows) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    vectorised([](const auto&... arguments) COMPACT_INLINED { rows_of<T, CAPPED>(arguments...); }, call, begin, end);
  });
}

template <class Call>
void run(const Call& call, const Tensor& z, bool capped) {
  const int64_t rows = z.size(0);
  if (z.scalar_type() == ScalarType::Float) {
    capped ? in_parallel<float, true>(call, rows) : in_parallel<float, false>(call, rows);
  } else {
    capped ? in_parallel<bfloat16, true>(call, rows) : in_parallel<bfloat16, false>(call, rows);
  }
}

bool are_logits(Check& check, const Tensor& z, const Tensor& targets, const std::optional<Tensor>& bias) {
  const auto dtype = z.scalar_type();
  return check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "logits are float32 or bfloat16") &&
         check(
             z.dim() == 2 && z.size(1) > 0 && (z.size(1) == 1 || z.stride(1) == 1),
             "logits are (n, V), a row's side by side") &&
         check(
             targets.scalar_type() == ScalarType::Long && targets.is_contiguous() && targets.numel() == z.size(0),
             "targets are int64, one a row of logits, contiguous") &&
         check(
             !bias ||
                 (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == z.size(1)),
             "bias is float32, (V,), contiguous");
}

const float* numbers(Check& check, const Tensor& tensor, int64_t count, const char* name) {
  check(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
      " is float32, one number a row, contiguous");
  return check.failed() ? nullptr : tensor.const_data_ptr<float>();
}

// The ids of the answers, and whose they are.
void take_answers(
    Check& check, StatisticsCall& call, const Tensor& ids, const std::optional<Tensor>& cu_answers,
    const std::optional<Tensor>& cu_rows) {
  if (!check(cu_answers && cu_rows, "answer_ids come with cu_answers and cu_rows") ||
      !check(ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), "answer_ids are int64, contiguous") ||
      !check(cu_answers->numel() == cu_rows->numel(), "cu_answers and cu_rows differ in length")) {
    return;
  }
  call.answer_ids = ids.const_data_ptr<int64_t>();
  call.num_rationales = cu_rows->numel() - 1;
  call.cu_answers = offsets_of(check, *cu_answers, 0, call.num_rationales, 0, ids.numel(), "cu_answers");
  call.cu_rows = offsets_of(check, *cu_rows, 0, call.num_rationales, 0, INT32_MAX, "cu_rows");
  for (int64_t i = 0; i < ids.numel() && !check.failed(); ++i) {
    check(
        call.answer_ids[i] >= 0 && call.answer_ids[i] < call.vocabulary, "answer_ids[", i, "] is ",
        call.answer_ids[i], ", the head has V = ", call.vocabulary);
  }
}

Head head_of(const std::optional<Tensor>& bias, double inner, double outer) {
  return {bias ? bias->const_data_ptr<float>() : nullptr, static_cast<float>(inner), static_cast<float>(outer)};
}

}  // namespace

Tensor row_statistics(
    Tensor z, Tensor targets, std::optional<Tensor> bias, std::optional<Tensor> answer_ids,
    std::optional<Tensor> cu_answers, std::optional<Tensor> cu_rows, double inner, double outer, int64_t ignore_index,
    Tensor table, int64_t first_row, bool store) {
  Check check;
  if (!are_logits(check, z, targets, bias)) return check.answer();
  const int64_t rows = z.size(0), vocabulary = z.size(1);
  if (!check(
          table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(0) == 10 &&
              table.stride(1) == 1 && first_row >= 0 && first_row <= table.size(1) - rows,
          "table is float32, (10, N), with room for ", rows, " rows from ", first_row, " on")) {
    return check.answer();
  }
  StatisticsCall call{};
  call.z = z.mutable_data_ptr();
  call.stride = z.stride(0);
  call.vocabulary = vocabulary;
  call.head = head_of(bias, inner, outer);
  call.targets = targets.const_data_ptr<int64_t>();
  call.ignore_index = ignore_index;
  call.first_row = first_row;
  call.table = table.mutable_data_ptr<float>() + first_row;
  call.table_stride = table.stride(0);
  call.store = store;
  for (int64_t row = 0; row < rows && !check.failed(); ++row) {
    const int64_t target = call.targets[row];
    check(
        target == ignore_index || (target >= 0 && target < vocabulary), "targets[", row, "] is ", target,
        ", the head has V = ", vocabulary);
  }
  if (answer_ids) take_answers(check, call, *answer_ids, cu_answers, cu_rows);
  if (!check.failed()) run(call, z, outer != 0);
  return check.answer();
}

Tensor gradient_block(
    Tensor z, Tensor targets, std::optional<Tensor> bias, double inner, double outer, Tensor pivot, Tensor slope,
    std::optional<Tensor> curve, Tensor target_gradient, int64_t first_column) {
  Check check;
  if (!are_logits(check, z, targets, bias)) return check.answer();
  const int64_t rows = z.size(0);
  GradientCall call{};
  call.z = z.mutable_data_ptr();
  call.stride = z.stride(0);
  call.width = z.size(1);
  call.head = head_of(bias, inner, outer);
  call.targets = targets.const_data_ptr<int64_t>();
  call.pivot = numbers(check, pivot, rows, "pivot");
  call.slope = numbers(check, slope, rows, "slope");
  call.curve = curve ? numbers(check, *curve, rows, "curve") : nullptr;
  call.target_gradient = numbers(check, target_gradient, rows, "target_gradient");
  call.first_column = first_column;
  if (!check.failed()) run(call, z, outer != 0);
  return check.answer();
}

std::string cpu_capability() {
  const Instructions found = instructions();
  return found == Instructions::avx512 ? "AVX-512" : found == Instructions::avx2 ? "AVX2" : "any";
}

}  // namespace compact
