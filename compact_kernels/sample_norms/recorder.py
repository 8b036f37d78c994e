"""Exact per-rationale gradient norms of a whole model, from the one backward pass that trains it."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compact_kernels.ragged import Ragged
from compact_kernels.sample_norms import costs, hooks, layers, ops
from compact_kernels.sample_norms.coverage import (
    embedding_scale,
    expert_adapters,
    is_linear,
    is_trained,
    normalisation,
    output_layer,
    own_forward,
    reason_against,
    same_parameter,
    trained,
    weight_of,
    widths,
)
from compact_kernels.sample_norms.head import HeadNorms
from compact_kernels.sample_norms.layers import HeadMember, ScaleMember, TokenMember
from compact_kernels.sample_norms.linear import Family, LinearMember, linear_forward
from compact_kernels.sample_norms.result import SampleNorms, Slots
from compact_kernels.sample_norms.segments import Segments

_OUTPUTS = re.compile(r"^(o_proj|out_proj|c_proj|dense|dense_4h_to_h|down_proj|fc2|w2|wo|fc_out)$")

_active: list[SampleGradNorms] = []


def active() -> SampleGradNorms | None:
    """The recorder whose batch is under way, if there is one: asked by the fused head."""
    return _active[-1] if _active else None


def default_group(name: str) -> str:
    """The part of a parameter's name after its layer's number, or the module that owns it: self_attn, mlp, norm, …"""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbers and numbers[-1] + 2 < len(parts):
        return parts[numbers[-1] + 1]
    return parts[-2] if len(parts) > 1 else "model"  # which is a layer itself


class SampleGradNorms:
    """Teaches a model to give the norm of each rationale's gradient in its ordinary backward pass.

    Layers: nn.Linear, transformers' Conv1D, nn.Embedding, LayerNorm and RMSNorm in their variants, biases, LoRA's A
    and B (they are linear layers), a head tied to the embedding, and the head inside
    :func:`compact_kernels.compatibility_loss`. Gradients are those of the ordinary backward pass. Forwards of the
    layers' *instances* are replaced until :meth:`remove`; outside :meth:`record` they run as before.

    A norm is of what flows: a loss term that mixes rationales (eq. 9's divergence) counts in each rationale it flows
    through. Under data parallelism norms are of the rank's own rationales and own loss; a GradScaler's factor is in
    them. Two uses of one layer in one forward pass, sequences split over ranks, and mixtures of experts are refused.
    A pass that gives only some parameters their gradients (``backward(inputs=…)``) may give norms of others too.

    Args:
        model: any wrapper of it too. Parameters that require gradients now are those measured.
        groups: from a parameter's name to the name of its group; a layer's weight and bias are in one.
        uncovered: "error", or "skip" parameters that no rule covers; they are listed in :attr:`skipped`.
        method: "exact", or "hutchinson": weights of linear layers by `probes` random projections, without the squares
            of the lengths in the cost, with a standard error (:attr:`SampleNorms.standard_error`).
        products: how linear layers give exact norms: by Gram matrices, by making the weight's gradient from the same
            pass, or whichever is less work for a batch. Where rationales are long, that pass stores each one's
            gradient of one layer at a time, in 512 MiB at most.
        norms: "weighted", u_s, or "unweighted": the loss of each rationale flows back unweighted and every layer
            weighs its weight's gradient by c_s, so that n_s is known where α is 0 too. The gradients are the same, if
            nothing but one compatibility_loss flows back: a penalty on the layers' states would be weighed too, and
            is not seen. The head has to be frozen and λ 0; layers make their own products, and are not compiled.

    Raises:
        ValueError: a trainable parameter that is not covered, by name and with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Callable[[str], str] = default_group,
        uncovered: Literal["error", "skip"] = "error",
        method: Literal["exact", "hutchinson"] = "exact",
        probes: int = 16,
        products: Literal["auto", "gram", "own"] = "auto",
        norms: Literal["weighted", "unweighted"] = "weighted",
    ) -> None:
        if uncovered not in ("error", "skip"):
            raise ValueError(f"uncovered is {uncovered!r}; it is error or skip")
        if products not in ("auto", "gram", "own"):
            raise ValueError(f"products is {products!r}; it is auto, gram or own")
        if method not in ("exact", "hutchinson"):
            raise ValueError(f"method is {method!r}; it is exact or hutchinson")
        if method == "hutchinson" and not 2 <= probes <= costs.NARROW:
            raise ValueError(f"probes is {probes}; a standard error needs 2 at least, and {costs.NARROW} is the most")
        if norms not in ("weighted", "unweighted"):
            raise ValueError(f"norms is {norms!r}; it is weighted or unweighted")
        self.unweighted = norms == "unweighted"
        if self.unweighted and (method != "exact" or products == "gram"):
            raise ValueError("unweighted norms are exact and come with the layers' own products")
        self.groups, self.products = groups, products
        self.probes = probes if method == "hutchinson" else 0
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.segments: Segments | None = None
        self.row_segments: Segments | None = None
        self.ragged: Ragged | None = None
        self.scales: Tensor | None = None
        self.ids: Tensor | None = None
        self.head_slot: Tensor | None = None
        self.head_weight: Tensor | None = None
        self.head_names: list[str] = []  # its weight, and its bias
        self.head_embedding: TokenMember | None = None
        self.skipped: list[str] = []
        self._cut: tuple[Ragged, Segments, Segments | None] | None = None
        self._slots: Slots | None = None
        self._removed = False
        self._called: set[int] = set()  # members of this pass, by id
        self._members: list[tuple[Any, nn.Module, list[str]]] = []
        self._families: list[Family] = []
        self._plan(model, uncovered)
        if self.unweighted:
            self._check_unweighted()

    # ---- use ----

    @contextmanager
    def record(self, ragged: Ragged) -> Iterator[SampleNorms]:
        """Around one forward pass over the packed batch `ragged`; its norms are there after its one backward pass.

        The backward pass may come inside or after the block; with gradient checkpointing it has to come inside. For
        gradient accumulation: a block for every micro-batch, whose norms are read before the next one begins.

        Raises:
            RuntimeError: a block inside a block; or parameters were frozen or unfrozen since this was made.
        """
        if self._removed:
            raise RuntimeError("this recorder has been removed from its model: make another one")
        if self.segments is not None:
            raise RuntimeError("a batch is being recorded already: one forward pass and its backward at a time")
        self._check_trains()
        if self._cut is None or self._cut[0] is not ragged:  # a batch seen again, as in a CUDA graph, copies nothing
            offsets = ragged.sizes
            rows = Segments.of(ragged.cu_rows, offsets.cu_rows) if self.head_weight is not None else None
            self._cut = ragged, Segments.of(ragged.cu_seqlens, offsets.cu_seqlens), rows
        self.ragged, segments, self.row_segments = self._cut
        if self.unweighted:  # what c_s will be, known after the forward pass
            dtype = torch.promote_types(next(iter(self.parameters.values())).dtype, torch.float32)
            self.scales = torch.full((segments.count,), float("nan"), dtype=dtype, device=ragged.device)
        result = self._new(segments, ragged.device)
        self._called.clear()
        self.segments = segments
        _active.append(self)
        try:
            yield result
        finally:
            _active.remove(self)
            self.segments = self.row_segments = self.ids = self.ragged = self.scales = None
            for family in self._families:
                family.close()
            if self.head_embedding is not None:
                self.head_embedding.carrier = None

    def remove(self) -> None:
        """Give the layers their own forwards back."""
        self._removed = True
        for member, module, _ in self._members:
            before = member.before
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before
            module.__dict__.pop("_sample_norms", None)
        self._members.clear()

    # ---- asked by layers ----

    def check_rows(self, module: nn.Module, rows: int) -> None:
        """
        Raises:
            RuntimeError: a layer sees other rows than the batch has.
        """
        if torch.compiler.is_compiling():
            return
        tokens = self.segments.tokens  # type: ignore[union-attr]
        if rows != tokens:
            raise RuntimeError(
                f"{type(module).__name__} was called on {rows} rows, the batch has {tokens} packed tokens: norms are "
                "by rationale, so every layer has to see all tokens in their order (no experts, no padding)"
            )

    def head_norms(
        self, weight: Tensor, bias: Tensor | None, ragged: Ragged | None
    ) -> tuple[HeadNorms, list[Tensor | None]]:
        """What collects a fused head's norms, and the slot and carrier that take them away.

        Raises:
            ValueError: another head, another batch, or a loss that knows no rationales.
            RuntimeError: a head used twice, or tied to an embedding that was not called.
        """
        if ragged is None:
            raise ValueError(
                "linear_logprob gives no norms of a head that trains: take compatibility_loss, whose rationales are "
                "known, or freeze the head"
            )
        if self.head_weight is None or not same_parameter(weight, self.head_weight):
            raise ValueError(
                "the head's weight trains, but is not that of the output layer of the model being recorded "
                "(get_output_embeddings()), or is made of it: its norms would be missing or another tensor's"
            )
        if self.row_segments is None or ragged.sizes.cu_rows != self.ragged.sizes.cu_rows:  # type: ignore[union-attr]
            raise ValueError("the loss is of another batch than the one being recorded")
        if bias is not None and bias.requires_grad != weight.requires_grad:
            raise ValueError("of the head, its weight and bias train both or neither: norms cover them together")
        self.note(self.head_weight)
        carrier = ids = None
        if self.head_embedding is not None:
            carrier = self.head_embedding.carrier
            if carrier is None or self.ids is None:
                raise RuntimeError(layers.UNSEEN_IDS)
            ids = self.ids.reshape(-1)
        assert self.segments is not None
        return HeadNorms(self.row_segments, ids, self.segments, bias is not None), [self.head_slot, carrier]

    def note(self, member: Any) -> None:
        """A layer is called; twice in one pass would need the two calls' cross terms.

        A checkpoint's second run of the forward pass happens in the backward pass, when gradients are under way.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        if id(member) in self._called:
            names = next((names for m, _, names in self._members if m is member), self.head_names)
            raise RuntimeError(
                f"{names[0]} is used twice: per-rationale norms do not cover a layer that is used twice in one "
                "forward pass, and two passes want a record() each"
            )
        self._called.add(id(member))

    # ---- plan ----

    def _plan(self, model: nn.Module, uncovered: str) -> None:
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    owners.setdefault(id(parameter), []).append((f"{path}.{key}" if path else key, module))
        reasons: dict[str, str] = {}
        modules: dict[nn.Module, str] = {}
        tied: dict[int, nn.Module] = {}
        for places in owners.values():
            first, module = places[0]
            kinds = [type(m) for _, m in places]
            pair = len(places) == 2 and isinstance(module, nn.Embedding) and isinstance(places[1][1], nn.Linear)
            if len(places) > 1 and not pair:
                shared = ", ".join(name for name, _ in places[1:])
                reasons[first] = f"it is shared with {shared}, of {kinds}; only an embedding and its head may be"
                continue
            if pair:
                tied[id(module)] = places[1][1]
                modules[places[1][1]] = places[1][0].rpartition(".")[0]
            modules[module] = first.rpartition(".")[0]
        heads, of_experts = {id(head) for head in tied.values()}, expert_adapters(model)
        embeddings: dict[int, TokenMember] = {}
        linear: list[tuple[str, nn.Module]] = []
        head = output_layer(model)
        for module, path in modules.items():
            names = trained(path, module)
            reason = reason_against(module)
            if id(module) in of_experts:
                reason = "it adapts experts fused into one parameter, whose rows no layer shows"
            if reason is None and len({self.groups(name) for name in names}) > 1 and id(module) not in heads:
                reason = f"the layer's parameters {', '.join(names)} are in different groups"
            if reason is not None:
                reasons |= {name: reason for name in names}
            elif is_linear(module):
                linear.append((path, module))
            elif isinstance(module, nn.Embedding):
                padding = -1 if module.padding_idx is None else module.padding_idx
                token = TokenMember(self, embedding_scale(module), padding, id(module) in tied, own_forward(module))
                embeddings[id(module)] = token
                self._install(module, token, layers.embedding_forward, names)
            else:
                kind, eps = normalisation(module)
                trains = is_trained(module, "weight"), is_trained(module, "bias")
                scale = ScaleMember(self, kind, eps, trains, own_forward(module))
                self._install(module, scale, layers.scale_forward, names)
        if reasons and uncovered == "error":
            name, reason = next(iter(reasons.items()))
            more = f" ({len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
            self.remove()
            raise ValueError(
                f"{name} trains, but its norm is not covered{more}: {reason}. Freeze it, or leave it out with "
                'uncovered="skip"'
            )
        self.skipped = sorted(reasons)
        families: dict[object, list[tuple[str, nn.Module]]] = {}
        for path, module in linear:
            names = trained(path, module)
            if head is module:
                self.head_weight, self.head_names = weight_of(module), names
                self.parameters[names[0]] = self.head_weight  # by another name too, where it is tied
            if id(module) in heads:
                self.head_embedding = embeddings[next(key for key, value in tied.items() if value is module)]
                tied_head = HeadMember(self, self.head_embedding, own_forward(module), is_trained(module, "bias"))
                self._install(module, tied_head, layers.head_forward, names)
            else:
                families.setdefault(self._family_of(path, module, names), []).append((path, module))
        for members in families.values():
            self._found_family(members)

    def _check_unweighted(self) -> None:
        """Every gradient that is weighted by c_s is made by a layer of ours."""
        way_out = 'freeze it, or take norms="weighted" and SampleNorms.per_weight'
        refused = self.head_names or self.skipped
        for member, _, names in self._members:
            if isinstance(member, LinearMember) and (member.before or not member.family.trains[member.index][0]):
                refused = names
        if refused:
            self.remove()
            raise ValueError(
                f"unweighted norms: {refused[0]} trains, and its gradient cannot be weighted apart "
                f"from the norm: {way_out}"
            )

    def _family_of(self, path: str, module: nn.Module, names: list[str]) -> object:
        """Siblings that may read one tensor: q, k and v; gate and up; their LoRA A's."""
        parts = path.split(".")
        adapter = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts))
        parent, name, rest = parts[: adapter - 1], parts[adapter - 1], parts[adapter:]
        if rest and rest[0] != "lora_A" or _OUTPUTS.match(name):
            return path
        return ".".join(parent), ".".join(rest), widths(module)[0], self.groups(names[0])

    def _found_family(self, members: list[tuple[str, nn.Module]]) -> None:
        outputs = [widths(module)[1] for _, module in members]
        trains = [(is_trained(module, "weight"), is_trained(module, "bias")) for _, module in members]
        patched = any(own_forward(module) is not None for _, module in members)
        family = Family(self, widths(members[0][1])[0], outputs, trains, patched)
        self._families.append(family)
        for index, (path, module) in enumerate(members):
            names = trained(path, module)
            member = LinearMember(family, index, not isinstance(module, nn.Linear), own_forward(module))
            self._install(module, member, linear_forward, names)

    def _install(self, module: nn.Module, member: Any, forward: Callable, names: list[str]) -> None:
        if "_sample_norms" in module.__dict__:
            self.remove()
            raise ValueError(f"{names[0]}'s layer has a recorder already: remove() it first")
        self._members.append((member, module, names))
        module._sample_norms = member
        module.forward = types.MethodType(forward, module)

    # ---- a batch ----

    def _check_trains(self) -> None:
        """
        Raises:
            RuntimeError: another parameter trains than when layers were planned.
        """
        for known, trains in ((self._frozen, False), (self.parameters.items(), True)):
            for name, parameter in known:
                if parameter.requires_grad != trains:
                    now = "trains no more" if trains else "trains now"
                    raise RuntimeError(f"{name} {now}: remove() this recorder and make another one")

    def _new(self, segments: Segments, device: torch.device) -> SampleNorms:
        before = {name: (id(p.grad), p.grad._version) for name, p in self.parameters.items() if p.grad is not None}
        plans: dict[tuple, tuple[bool, list[bool]]] = {}
        for family in self._families:  # a model's layers are alike: what is planned for one holds for all
            kind = family.input_width, *family.widths, *family.trains, family.patched
            if kind not in plans:
                stored = [costs.stored(family.input_width, width, segments) for width in family.widths]
                plans[kind] = self._own_products(family, segments), stored
            family.own, family.stored = plans[kind]
        parts, count, slices = segments.tiles.shape[0], segments.count, segments.slices
        shape = parts, count, slices, device, [(family.own, *family.stored) for family in self._families]
        if self._slots is None or self._slots.shape != shape or self._slots.awaited():
            self._slots = Slots(shape, *self._leaves(parts, count, slices, device))
        for _, _, leaf in self._slots.leaves:
            hooks.empty_slot(leaf)
        self._slots.batch = SampleNorms(self, segments, self._slots, before, self.scales)
        return self._slots.batch

    def _leaves(
        self, parts: int, count: int, slices: int, device: torch.device
    ) -> tuple[list[tuple[str, str, Tensor]], dict[int, list[str]]]:
        """A leaf for whatever gives norms, with its group and kind, and the parameters behind each."""
        slots: list[tuple[str, str, Tensor]] = []
        names: dict[int, list[str]] = {}

        def new(owners: list[str], kind: str, dtype: torch.dtype, *sizes: int) -> Tensor:
            wide = torch.promote_types(dtype, torch.float32)
            slot = hooks.new_slot(wide, device, sizes)
            slots.append((self._group(owners[0]), kind, slot))
            names[id(slot)] = owners
            return slot

        for family in self._families:
            family.slots = [torch.empty(0)] * len(family.widths)
        for member, module, owners in self._members:
            dtype = weight_of(module).dtype
            if isinstance(member, LinearMember):
                family, width = member.family, member.family.widths[member.index]
                weight, bias = family.trains[member.index]
                if family.own:
                    shape = (family.input_width, width) if member.transposed else (width, family.input_width)
                    like, stored = torch.empty(0, dtype=dtype, device=device), family.stored[member.index]
                    blocks = ops.product_parts(*shape, like, stored)
                    member.slot = new(owners, "parts", dtype, blocks, count)
                    member.bias_slot = new(owners, "vectors", dtype, count, slices, width) if bias else None
                elif self.probes:
                    family.slots[member.index] = new(owners, "estimate", dtype, 2, count)
                else:
                    family.slots[member.index] = new(owners, "tiles", dtype, parts)
            elif isinstance(member, ScaleMember):
                size = weight_of(module).shape[0]
                member.slot = new(owners, "vectors", dtype, count, slices, size) if member.trains[0] else None
                member.bias_slot = new(owners, "vectors", dtype, count, slices, size) if member.trains[1] else None
            else:
                member.slot = new(owners, "tiles", dtype, parts)
        if self.head_weight is not None:
            assert self.row_segments is not None
            self.head_slot = new(self.head_names, "parts", self.head_weight.dtype, 1, count)
        # The members of a family whose node another one opened have no gradient of their own in their slots.
        for family in self._families:
            mine = [names[id(slot)] for slot in family.slots if id(slot) in names]
            together = [name for owners in mine for name in owners]
            for slot in family.slots:
                if id(slot) in names:
                    names[id(slot)] = together
        return slots, names

    def _group(self, name: str) -> str:
        """A tied head is in its embedding's group."""
        if self.head_embedding is not None and name in self.head_names:
            name = next(names[0] for member, _, names in self._members if member is self.head_embedding)
        return self.groups(name)

    def _own_products(self, family: Family, segments: Segments) -> bool:
        """Whether the family's layers make their weights' gradients themselves."""
        if self.unweighted:
            return True
        if self.probes or family.patched or not all(weight for weight, _ in family.trains):
            return False
        if self.products != "auto":
            return self.products == "own"
        return costs.own(family.input_width, family.widths, segments)


@contextmanager
def sample_grad_norms(model: nn.Module, ragged: Ragged, **options: Any) -> Iterator[SampleNorms]:
    """Norms of every rationale's gradient over all trainable parameters, for one forward and backward pass.

    >>> with sample_grad_norms(model, ragged) as norms:
    ...     loss = compatibility_loss(…).loss
    ...     loss.backward()
    >>> norms.norms  # (S,) u_s; norms.by_group: squared, by group of parameters

    Args:
        options: those of :class:`SampleGradNorms`, which is what to keep where this is done at every step.
    """
    recorder = SampleGradNorms(model, **options)
    try:
        with recorder.record(ragged) as norms:
            yield norms
    finally:
        recorder.remove()
