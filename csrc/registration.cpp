// Every op of the library with its schema. The ops check what would read or write foreign memory and answer with their
// refusal (ops.h), which compact_kernels/native.py raises; the Python that calls them explains a user's errors. Of the
// CUDA ops only sizes are checked: offsets lie on the device, and are taken from a Ragged, which was checked when built.
#include "ops.h"

STABLE_TORCH_LIBRARY(compact_native, m) {
  // Logits z (n, V), rows strided, float32 or bfloat16: statistics into columns first_row … of the table (10, N), whose
  // rows are the fields of compact_kernels.head.rows.RowStatistics. `store`: z becomes exp(z − pivot)·slope, its
  // target's entry −Σ of the others, so that inverse_sum makes it the gradient of −log p(target).
  m.def(
      "row_statistics(Tensor(a!) z, Tensor targets, Tensor? bias, Tensor? answer_ids, Tensor? cu_answers, "
      "Tensor? cu_rows, float inner, float outer, int ignore_index, Tensor(b!) table, int first_row, bool store) -> "
      "Tensor");
  // Raw logits (n, width) of the head's columns first_column … become exp(u)·(slope + curve·u), u = z − pivot, with
  // the softcap's slope; the target's entry is given.
  m.def(
      "gradient_block(Tensor(a!) z, Tensor targets, Tensor? bias, float inner, float outer, Tensor pivot, Tensor "
      "slope, Tensor? curve, Tensor target_gradient, int first_column) -> Tensor");
  // Eq. 9 or MIND's JSD on the answer rows E (n, V) of questions first … last − 1, Σ E in sums: values D (Q,) and
  // scores C (G,). With a gain (S,) instead: E becomes gain·(∂D/∂z)/α, and scores are read.
  m.def(
      "answer_divergence(Tensor(a!) rows, Tensor sums, Tensor cu_questions, Tensor cu_span, Tensor alpha, "
      "int first_question, int last_question, int first_row, bool jsd, Tensor(b!) per_question, Tensor(c!) scores, "
      "Tensor? gain) -> Tensor");
  // Eq. 3, 6 and 7 for questions first … last − 1: metrics, α (S,) and row weights (N,), in one launch.
  m.def(
      "decide_questions(Tensor logprob, Tensor evidence, Tensor targets, Tensor thinking, Tensor cu_questions, "
      "Tensor cu_rows, Tensor body, Tensor? consensus, Tensor? reference, Tensor? weights, Tensor normalizer, "
      "Tensor(a!) alpha, Tensor(b!) adaptability, Tensor(c!) difficulty, Tensor(d!) counted, Tensor(e!) row_weight, "
      "int first_question, int last_question, int ignore_index, float beta_adaptability, float beta_consensus, "
      "float beta_difficulty, float temperature, float epsilon, bool body_only, bool per_body_token, "
      "bool per_target) -> Tensor");
  // Eq. 4–5: degree (S,) of the graphs of all questions, from query and key (S, H, d), in one launch.
  m.def(
      "question_in_degree(Tensor query, Tensor key, Tensor cu_questions, float scale, int most_rationales, "
      "Tensor(a!) degree) -> Tensor");
  // Why the CUDA part cannot run on a device; empty if it can.
  m.def("cuda_trouble(int device) -> str");
  // Which of the CPU's instruction sets the ops use.
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(compact_native, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&compact::row_statistics));
  m.impl("gradient_block", TORCH_BOX(&compact::gradient_block));
  m.impl("answer_divergence", TORCH_BOX(&compact::answer_divergence));
}

#ifdef COMPACT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(compact_native, CUDA, m) {
  m.impl("decide_questions", TORCH_BOX(&compact::decide_questions));
  m.impl("question_in_degree", TORCH_BOX(&compact::question_in_degree));
}
#else
namespace compact {
std::string cuda_trouble(int64_t) { return "the library was built without its CUDA part"; }
}  // namespace compact
#endif

STABLE_TORCH_LIBRARY_IMPL(compact_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_trouble", TORCH_BOX(&compact::cuda_trouble));
  m.impl("cpu_capability", TORCH_BOX(&compact::cpu_capability));
}
