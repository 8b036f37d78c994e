"""Which layers' per-rationale norms there is a rule for, and what the rules need to know of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compact_kernels.sample_norms.plain import normalized


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def own_forward(module: nn.Module) -> Callable | None:
    """The forward that an instance was given, None where it is the class's."""
    return module.__dict__.get("forward")


def trained(path: str, module: nn.Module) -> list[str]:
    """Names of the parameters of a module, and of no module inside it, that train."""
    own = module.named_parameters(recurse=False)
    return [f"{path}.{key}" if path else key for key, parameter in own if parameter.requires_grad]


def is_trained(module: nn.Module, key: str) -> bool:
    """Whether a module has such a parameter of its own, and it trains."""
    parameter = module._parameters.get(key)
    return parameter is not None and parameter.requires_grad


def same_parameter(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is the parameter, or holds its values and hands their gradient on to it."""
    if tensor.shape != parameter.shape:
        return False
    if torch.compiler.is_compiling():
        return True
    nodes, leaves = [tensor.grad_fn], [tensor] if tensor.grad_fn is None else []
    for node in nodes:
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
        # Of torch's own nodes (…0) only views and copies of the same shape; of Functions what DDP and DTensor pass on.
        elif node is not None and (node.name() in _SAME or not node.name().endswith("0")):
            nodes += [following for following, _ in node.next_functions]
    # FSDP2 has a leaf of its own in the parameter's place while its module is whole.
    return any(leaf is parameter or isinstance(parameter, DTensor) for leaf in leaves)


_SAME = ("AliasBackward0", "CloneBackward0", "ToCopyBackward0", "ViewBackward0")


def is_linear(module: nn.Module) -> bool:
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def widths(module: nn.Module) -> tuple[int, int]:
    """(D_in, D_out)"""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = weight_of(module)
    return weight.shape[0], weight.shape[1]


def embedding_scale(module: nn.Embedding) -> float:
    if type(module).forward is nn.Embedding.forward:
        return 1.0  # whatever it is called, somebody else multiplies by it
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale)


def normalisation(module: nn.Module) -> tuple[str, float]:
    """Kind and ε of a norm layer."""
    if isinstance(module, nn.LayerNorm):
        return "layer", module.eps
    given = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    eps = next((value for value in given if value is not None), None)
    if eps is None:  # torch's default is that of the dtype it computes in
        eps = torch.finfo(torch.promote_types(weight_of(module).dtype, torch.float32)).eps
    return "rms", float(eps)


def reason_against(module: nn.Module) -> str | None:
    """Why a layer's norms are not covered; None if they are."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    name = type(module).__name__
    if is_linear(module) or isinstance(module, nn.Embedding):
        if more := own - {"weight", "bias"}:
            return f"no rule for a {name}'s {', '.join(sorted(more))}"
    if is_linear(module):
        kind = "is not its input times its weight, plus its bias"
    elif isinstance(module, nn.Embedding):
        if module.sparse or module.max_norm is not None or module.scale_grad_by_freq:
            return "the embedding is sparse, bounded (max_norm) or scaled by frequency"
        kind = "is an embedding of its own kind"
    elif not own or not own <= {"weight", "bias"} or any(p.dim() != 1 for p in module.parameters(recurse=False)):
        return f"no rule for a {name} with {', '.join(sorted(own))}"
    elif isinstance(module, nn.LayerNorm):
        kind = "is not (x − mean) / std times its weight, plus its bias"
    elif isinstance(module, nn.RMSNorm) or (name.endswith("RMSNorm") and "bias" not in own):
        kind = "is not x / rms(x) times its weight (or 1 + weight), with the ε that it names"
    else:
        return f"no rule for a {name} with {', '.join(sorted(own))}"
    known = type(module).forward in (nn.Linear.forward, nn.Embedding.forward, nn.LayerNorm.forward)
    if own_forward(module) is not None:
        return None if _behaves(module) else f"{name} {kind}, in the forward that this instance was given"
    return None if known or _behaves(module) else f"{name} {kind}"


def _behaves(module: nn.Module) -> bool:
    """Whether a layer does what its rule takes it to, tried on a few tokens where its weight is at hand.

    Not in training: there it may drop something out, or be compiled.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta or weight.numel() == 0:
        return True
    training, module.training = module.training, False
    try:
        with torch.autocast(weight.device.type, enabled=False):
            return (
                _gives_rows(module, weight) if isinstance(module, nn.Embedding) else _gives_gradients(module, weight)
            )
    except Exception:  # a gate, a second input, a shape of its own
        return False
    finally:
        module.training = training


@torch.no_grad()
def _gives_rows(module: nn.Embedding, weight: Tensor) -> bool:
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
    return _close(module.forward(ids[None])[0], weight[ids].float() * embedding_scale(module))


@torch.enable_grad()
def _gives_gradients(module: nn.Module, weight: Tensor) -> bool:
    """Whether weight and bias get the gradients that the rule makes of input and output's gradient.

    Norm layers' also for small inputs, where ε decides.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(width: int) -> Tensor:
        return torch.randn(3, width, generator=generator, dtype=torch.float64, device="cpu").to(weight)

    linear = is_linear(module)
    x = drawn(widths(module)[0] if linear else weight.shape[0])
    inputs = [x] if linear else [x, x * max(normalisation(module)[1] ** 0.5, 1e-3)]
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    for x in inputs:
        y = module.forward(x[None])[0]
        g = drawn(y.shape[-1])
        found = torch.autograd.grad(y, list(own.values()), g.to(y.dtype))
        x, g = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (x, g))
        if not linear:
            of_weight = (g * normalized(x, *normalisation(module))).sum(0)
        else:
            of_weight = g.t() @ x if isinstance(module, nn.Linear) else x.t() @ g
        truths = {"weight": of_weight, "bias": g.sum(0)}
        if not all(_close(gradient, truths[name]) for name, gradient in zip(own, found)):
            return False
    return True


def _close(found: Tensor, truth: Tensor) -> bool:
    """As far as the found one's dtype can tell; what is no number is not."""
    tolerance = 0.05 if found.dtype.itemsize == 2 else 1e-3
    return bool((found - truth).abs().max() <= tolerance * truth.abs().max())


def expert_adapters(model: nn.Module) -> set[int]:
    """Ids of peft's A and B on experts fused into one parameter, which are multiplied by the weight and by no rows."""
    wrappers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    parts = [getattr(wrapper, name, None) for wrapper in wrappers for name in ("lora_A", "lora_B")]
    return {id(module) for part in parts if part is not None for module in part.modules()}


def output_layer(model: nn.Module) -> nn.Module | None:
    """The lm head, if the model says which one it is."""
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):
            found: nn.Module | None = module.get_output_embeddings()  # type: ignore[operator]
            while found is not None and not is_linear(found) and hasattr(found, "modules_to_save"):
                found = next(iter(found.modules_to_save.values()))  # type: ignore[operator]
            return found
    return None
