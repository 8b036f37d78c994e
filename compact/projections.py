"""Queries and keys of the last attention layer, by which consensus knows a rationale (eq. 4)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from compact.attention import noted
from compact.errors import UserError
from compact.models import decoder_layers, evaluation_mode, gathered


class Tap:
    """Forward pre-hook of the last attention module: keeps its input at `rows`, while there are rows to keep.

    Gradient checkpointing runs the hook again during backward; `rows` is None by then, so nothing is kept.
    """

    rows: Tensor | None = None  # (S,) int64
    states: Tensor | None = None  # (S, D)
    position_embeddings: tuple[Tensor, Tensor] | None = None  # (1, T, d_rotary) each, for their sizes

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.rows is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.states = hidden.detach()[0, self.rows]
            self.position_embeddings = kwargs.get("position_embeddings")

    def take(self) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        taken = self.states, self.position_embeddings
        self.rows = self.states = self.position_embeddings = None
        return taken


def last_attention(model: PreTrainedModel) -> nn.Module:
    for candidate in decoder_layers(model)[-1].modules():
        if type(candidate).__name__.endswith("Attention") and isinstance(
            getattr(candidate, "config", None), PretrainedConfig
        ):
            return candidate
    raise UserError(
        f"{type(model).__name__}: no attention module in its last layer, so there are no query and key projections "
        "for the consensus graph (eq. 4); set consensus.affinity=cosine"
    )


def tap_of(attention: nn.Module) -> Tap | None:
    return next((hook for hook in attention._forward_pre_hooks.values() if isinstance(hook, Tap)), None)


@torch.compiler.disable
@torch.no_grad()
def query_key(model: PreTrainedModel, states: Tensor, rotary: object) -> tuple[Tensor, Tensor]:
    """Queries and keys (S, H, d) float32 of eq. 4, from the last layer's attention input `states` (S, D).

    The attention module itself is run on S sequences of one token at rotary position 0, where rotating is the
    identity, with an attention function that notes what it is given: every layout of the projections (fused,
    interleaved, Conv1D), query/key norms, clipping and live LoRA are the module's own. In float32, because states
    after identical suffixes lie close (method §2), and without LoRA dropout: it must not draw random numbers, or
    gradient checkpointing would recompute with other masks. The layer's logit scale is folded into the query.
    """
    attention = last_attention(model)
    inputs: dict = {"attention_mask": None, "position_ids": states.new_zeros((len(states), 1), dtype=torch.int64)}
    if isinstance(rotary, tuple):
        cos, sin = rotary
        inputs["position_embeddings"] = torch.ones_like(cos[:, :1]).float(), torch.zeros_like(sin[:, :1]).float()
    try:
        with (
            evaluation_mode(attention),
            gathered(model, attention),
            torch.autocast(states.device.type, enabled=False),
            noted(cast(PretrainedConfig, attention.config)) as projections,
        ):
            parameters = {
                name: parameter.float() if parameter.is_floating_point() else parameter
                for name, parameter in attention.named_parameters()
            }
            functional_call(attention, parameters, (states.float().unsqueeze(1),), inputs)
            found = list(projections)
    except (TypeError, ValueError, AttributeError) as error:
        raise _no_projections(model, attention) from error
    if len(found) != 1 or found[0].query.shape[2] != 1:
        raise _no_projections(model, attention)
    query, key = found[0].query[:, :, 0], found[0].key[:, :, 0]
    if found[0].scaling is not None:
        query = query * (found[0].scaling * query.shape[-1] ** 0.5)
    return query.float(), key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def _no_projections(model: PreTrainedModel, attention: nn.Module) -> UserError:
    return UserError(
        f"{type(model).__name__}: the query and key projections of its last attention layer "
        f"({type(attention).__name__}) cannot be found for the consensus graph (eq. 4); set consensus.affinity=cosine"
    )
