"""How far off the head's gradient is in bfloat16 and float32, by the GPU's kernels in Triton's interpreter:
`TRITON_INTERPRET=1 python gradients.py STUDENT TRAIN.jsonl`, a student after some steps and its training file.

Two questions with all their rationales; of the vocabulary the 3072 tokens that matter, which the interpreter can do in
two minutes. The truth is the definition in float64, at the weights that COMPACT's rule gives there.
"""

import sys
import tempfile
from pathlib import Path

import torch

from compact.collate import Collator
from compact.config import load_recipe
from compact.loss import consensus_vectors, forward, targets_of
from compact.student import load_student
from compact.training_data import training_data
from compact_kernels import compatibility_loss, question_consensus

QUESTIONS, KEPT = (3, 17), 3072

student, train = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    recipe = load_recipe(["skills", "--student.model", student, "--run", folder, "--data.train", train])
    model, tokenizer = load_student(recipe.student, seed=0)
    questions = training_data(recipe, tokenizer, Path(folder))[0]
    batch = Collator(tokenizer=tokenizer)([questions[i] for i in QUESTIONS])
with torch.no_grad():
    output = forward(model, batch)
    ragged, targets = batch["ragged"], targets_of(batch)
    hidden, weight = output.hidden.float(), output.head.weight.float()
    consensus = question_consensus(*consensus_vectors(output, batch, recipe), ragged)
    matters = torch.softmax(hidden[ragged.rows] @ weight.t(), -1).amax(0)
    matters[torch.cat([targets[targets >= 0], ragged.evidence_ids])] = 2
    kept = matters.topk(KEPT).indices.sort().values
    new = torch.full((len(weight),), -1).index_copy_(0, kept, torch.arange(KEPT))
    weight, targets = weight[kept], torch.where(targets >= 0, new[targets.clamp_min(0)], targets)
    ragged.evidence_ids.copy_(new[ragged.evidence_ids])
    truth = compatibility_loss(
        hidden.double(), weight.double(), targets, ragged, consensus=consensus.double(), implementation="reference"
    )


def gradients(dtype: torch.dtype, implementation: str = "auto") -> dict[str, torch.Tensor]:
    """Of hidden states and head, and the divergence's share of both."""
    by_weight = {}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for divergence in (0.0, 0.1):
        leaves = [tensor.to(wide).clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = compatibility_loss(
                *leaves, targets, ragged, weights=truth.alpha.to(wide), divergence_weight=divergence,
                implementation=implementation, workspace_mib=4096,
            ).loss  # fmt: skip
        loss.backward()
        by_weight[divergence] = [leaf.grad.double() for leaf in leaves]
    found = dict(zip(("hidden states", "head"), by_weight[0.1]))
    shares = (both - alone for both, alone in zip(by_weight[0.1], by_weight[0.0]))
    return found | dict(zip(("divergence, hidden states", "divergence, head"), shares))


exact = gradients(torch.float64, "reference")
for dtype in (torch.bfloat16, torch.float32):
    for name, found in gradients(dtype).items():
        true = exact[name]
        off, along = (found - true).norm() / true.norm(), (found * true).sum() / true.square().sum()
        print(f"{dtype}, {name}: off by {off:.1e}; along the true one {along:.4f}")
