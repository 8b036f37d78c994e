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

void row_statistics(
    Tensor z, Tensor targets, std::optional<Tensor> bias, std::optional<Tensor> answer_ids,
    std::optional<Tensor> cu_answers, std::optional<Tensor> cu_rows, double inner, double outer, int64_t ignore_index,
    Tensor table, int64_t first_row, bool store);

void gradient_block(
    Tensor z, Tensor targets, std::optional<Tensor> bias, double inner, double outer, Tensor pivot, Tensor slope,
    std::optional<Tensor> curve, Tensor target_gradient, int64_t first_column);

std::string cpu_capability();

}  // namespace compact
