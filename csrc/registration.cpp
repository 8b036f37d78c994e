// Every op of the library with its schema. The ops check what would read or write foreign memory; the Python around
// them (compact_kernels/native.py and its callers) explains a user's errors.
#include "ops.h"

STABLE_TORCH_LIBRARY(compact_native, m) {
  // Logits z (n, V), rows strided, float32 or bfloat16: statistics into columns first_row … of the table (10, N), whose
  // rows are the fields of compact_kernels.head.rows.RowStatistics. `store`: z becomes exp(z − pivot)·slope, its
  // target's entry −Σ of the others, so that inverse_sum makes it the gradient of −log p(target).
  m.def(
      "row_statistics(Tensor(a!) z, Tensor targets, Tensor? bias, Tensor? answer_ids, Tensor? cu_answers, "
      "Tensor? cu_rows, float inner, float outer, int ignore_index, Tensor(b!) table, int first_row, bool store) -> "
      "()");
  // Raw logits (n, width) of the head's columns first_column … become exp(u)·(slope + curve·u), u = z − pivot, with
  // the softcap's slope; the target's entry is given.
  m.def(
      "gradient_block(Tensor(a!) z, Tensor targets, Tensor? bias, float inner, float outer, Tensor pivot, Tensor "
      "slope, Tensor? curve, Tensor target_gradient, int first_column) -> ()");
  // Which of the CPU's instruction sets the ops use.
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(compact_native, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&compact::row_statistics));
  m.impl("gradient_block", TORCH_BOX(&compact::gradient_block));
}

STABLE_TORCH_LIBRARY_IMPL(compact_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&compact::cpu_capability));
}
