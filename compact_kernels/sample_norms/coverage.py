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
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale)


def normalisation(module: nn.Module) -> tuple[str, float]:
    """Kind and ε of a norm layer."""
    if isinstance(module, nn.LayerNorm):
        return "layer", module.eps
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return "rms", torch.finfo(weight_of(module).dtype).eps if eps is None else float(eps)


def reason_against(module: nn.Module) -> str | None:
    """Why a layer's norms are not covered; None if they are."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if (more := own - {"weight", "bias"}) and (is_linear(module) or isinstance(module, nn.Embedding)):
        return f"no rule for a {type(module).__name__}'s {', '.join(sorted(more))}"
    if is_linear(module):
        return None
    if isinstance(module, nn.Embedding):
        if module.sparse or module.max_norm is not None or module.scale_grad_by_freq:
            return "the embedding is sparse, bounded (max_norm) or scaled by frequency"
        scaled = hasattr(module, "embed_scale") or hasattr(module, "scalar_embed_scale")
        if type(module).forward is not nn.Embedding.forward and not scaled:
            return f"{type(module).__name__} is an embedding of its own kind"
        return None
    if own and own <= {"weight", "bias"} and all(p.dim() == 1 for p in module.parameters(recurse=False)):
        if type(module).forward is nn.LayerNorm.forward:
            return None
        name = type(module).__name__
        if isinstance(module, nn.LayerNorm):
            return None if _behaves(module) else f"{name} is not (x − mean) / std times its weight, plus its bias"
        if isinstance(module, nn.RMSNorm) or (name.endswith("RMSNorm") and "bias" not in own):
            return None if _behaves(module) else f"{name} is not x / rms(x) times its weight (or 1 + weight)"
    return f"no rule for a {type(module).__name__} with {', '.join(sorted(own))}"


@torch.no_grad()
def _behaves(module: nn.Module) -> bool:
    """Whether a norm layer does what its name says, tried on two rows where its weight is at hand."""
    weight = module.weight
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.is_meta or weight.numel() == 0:
        return True
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, weight.shape[0], generator=generator, dtype=torch.float64, device="cpu").to(weight)
    try:
        found = type(module).forward(module, x)
    except Exception:  # a gate, a second input
        return False
    truth = normalized(x, *normalisation(module))
    tolerance = 0.05 if weight.dtype.itemsize == 2 else 1e-4
    bias = getattr(module, "bias", None)
    found = found.to(truth.dtype) if bias is None else found.to(truth.dtype) - bias
    return any(torch.allclose(found, truth * w, rtol=tolerance, atol=tolerance) for w in (weight, 1 + weight))


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
