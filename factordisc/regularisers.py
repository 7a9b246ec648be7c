"""What bounds a network: spectral normalisation that costs no more than it must."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

__all__ = ["spectral_norm"]

# Every layer of torch whose map is linear in one tensor named `weight`.
_KINDS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear)


def spectral_norm(network: nn.Module, *, every_forward: bool = False) -> nn.Module:
    r"""Divides every layer's weight by its largest singular value :math:`\sigma`, once.

    It is `torch.nn.utils.parametrizations.spectral_norm` on every linear, convolutional (also
    transposed), embedding and bilinear layer: the same parameters, state dict, outputs and
    gradients. Two things make it cheaper. A linear layer divides its output in place of its
    weight, in one autograd node. And sigma, which a step of the power iteration refines, is
    refined once per update of the weight: real rows, fake rows and the generator's step are
    bounded by the same sigma if no update lies between them.

    A layer that is normalised already stays normalised once; layers that two networks share are
    normalised once. Other tensors (of recurrent layers, of attention's input projections, of
    normalisation layers) stay free.

    Where an iteration can not be remembered (in a graph of `torch.compile`) every forward pass in
    training mode makes one, as torch's does. The transforms of `torch.func` see a pure function
    of weight and singular vectors, which makes none; see `iterate`.

    Args:
        network: The network, or a single layer. It is changed in place.
        every_forward: Iterate in every forward pass in training mode, exactly as torch does,
            whether or not the weight has changed.

    Returns:
        The network itself.

    Raises:
        ValueError: If no layer has a weight; if a layer's weight does not exist yet (lazy
            layers), or is computed by something else. The network is then as it was.

    References:
        Miyato et al. (2018), Spectral Normalization for Generative Adversarial Networks.

    Example:
        >>> network = spectral_norm(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> sorted(network.state_dict())[:3]
        ['0.bias', '0.parametrizations.weight.0._u', '0.parametrizations.weight.0._v']
    """
    layers = {path: m for path, m in network.named_modules() if isinstance(m, _KINDS)}
    if not layers:
        raise ValueError(
            f"spectral_norm finds no layer with a weight in this {type(network).__name__}: "
            "no linear, convolutional, embedding or bilinear layer."
        )
    for path, layer in layers.items():
        _check(f"layer {path!r}" if path else "the network", layer)
    for layer in layers.values():
        if not parametrize.is_parametrized(layer, "weight"):
            parametrizations.spectral_norm(layer)
        norm = _parametrisation(layer)[0]
        is_torchs = type(norm) is parametrizations._SpectralNorm
        if is_torchs and not norm._u.is_complex():
            norm.__class__ = SpectralNorm
            norm._memory = _Memory()
            if norm.dim == 0:  # else u and v have changed places
                _divide_outputs(layer)
        norm.every_forward = every_forward
    return network


def iterate(
    weight: Tensor, u: Tensor, v: Tensor, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor]:
    """Does one step of the power iteration, on one matrix or on a stack of them at once.

    Args:
        weight: With shape (..., out, in).
        u: The left singular vectors, with shape (..., out). Only their place is taken.
        v: The right singular vectors, with shape (..., in).
        eps: The least norm that a vector is divided by.

    Returns:
        The next u and v, which are constants, and sigma with shape (...), which is not: its
        gradient with respect to the weight is u v^T.
    """
    constant, stacked = weight.detach(), weight.dim() > 2
    with _full_precision(weight):
        u = _unit((constant @ v[..., None])[..., 0] if stacked else constant.mv(v), eps)
        back = (u[..., None, :] @ weight)[..., 0, :] if stacked else weight.t().mv(u)
        v = _unit(back.detach(), eps)
        # |W^T u| = u . W v: no third product with the weight
        return u, v, torch.linalg.vecdot(back, v)


def _unit(vector: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return vector / norm.clamp_min_(eps)


class _Memory:
    """What the last iteration found, and for which weight. A copied layer has its own."""

    __slots__ = ("found", "key", "weight")

    def __init__(self) -> None:
        self.weight: weakref.ref[Tensor] | None = None
        self.key: tuple[int, ...] = ()
        self.found: tuple[Tensor, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memory:
        return _Memory()

    def recall(self, weight: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns u, v and sigma if nothing says that the weight has changed since."""
        known = self.weight is not None and self.weight() is weight and self.key == key
        return self.found if known else None

    def keep(
        self, weight: Tensor, key: tuple[int, ...], found: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self.weight, self.key, self.found = weakref.ref(weight), key, found

    def forget(self) -> None:
        self.weight = self.found = None


class SpectralNorm(parametrizations._SpectralNorm):
    """Torch's parametrisation, in one autograd node and with a memory."""

    _memory: _Memory
    every_forward: bool

    def forward(self, weight: Tensor) -> Tensor:
        if not _is_ordinary(weight):
            return torch.div(weight, self.sigma(weight))
        found = self.vectors(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return torch.div(weight, found[2])
        y: Tensor = _DividedWeight.apply(weight, *found, self.dim, self._memory)  # type: ignore[no-untyped-call]
        return y

    def sigma(self, weight: Tensor) -> Tensor:
        """Returns sigma in differentiable operations that every tracer understands."""
        if self.training and not torch._C._are_functorch_transforms_active():
            return self._iterated(weight)[2]
        u, v = self._u.clone(), self._v.clone()
        with _full_precision(weight):
            return torch.dot(u, self._reshape_weight_to_matrix(weight).mv(v))

    def vectors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns u, v and sigma, constants that nobody overwrites."""
        remembers = self.training and not self.every_forward
        found = self._memory.recall(weight, self._key(weight)) if remembers else None
        return found or self._new_vectors(weight)

    @torch.no_grad()
    def _new_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return self._u.clone(), self._v.clone(), self.sigma(weight)
        found = self._iterated(weight)
        self._memory.keep(weight, self._key(weight), found)
        return found

    def _iterated(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        matrix = self._reshape_weight_to_matrix(weight)
        u, v, sigma = iterate(matrix, self._u, self._v, self.eps)
        for _ in range(1, self.n_power_iterations):
            u, v, sigma = iterate(matrix, u, v, self.eps)
        with torch.no_grad():
            # in place: state dicts, DataParallel and compiled graphs hold these tensors
            self._u.copy_(u)
            self._v.copy_(v)
        return u, v, sigma

    def _key(self, weight: Tensor) -> tuple[int, ...]:
        u: Tensor = self._u
        return weight.data_ptr(), weight._version, u.data_ptr(), u._version


class _DividedWeight(torch.autograd.Function):
    """W / sigma, for layers whose weight is small against what they do with it."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int, memory: _Memory
    ) -> Tensor:
        ctx.save_for_backward(weight, u, v, sigma)
        ctx.dim, ctx.memory = dim, memory
        return weight / sigma

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, sigma = ctx.saved_tensors
        ctx.memory.forget()
        g = g.to_dense() if g.is_sparse else g  # of an embedding
        rows = weight.movedim(ctx.dim, 0)
        u, v = u.view(-1, *(1,) * (weight.dim() - 1)), v.view(1, *rows.shape[1:])
        if torch.is_grad_enabled():
            sigma = (u * rows * v).sum()
        gs = g / sigma
        scale = u * ((gs * weight).sum() / sigma)
        if torch.is_grad_enabled():
            return gs - (scale * v).movedim(0, ctx.dim), *(None,) * 5
        gs.movedim(ctx.dim, 0).addcmul_(scale, v, value=-1)
        return gs, *(None,) * 5


class _DividedOutput(torch.autograd.Function):
    """x W^T / sigma + b. An activation may overwrite it: it is not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        memory: _Memory,
    ) -> Tensor:
        z = functional.linear(x, weight)
        ctx.save_for_backward(x, weight, u, v, sigma, z)
        ctx.memory = memory
        return _divided(z, sigma, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, v, sigma, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated again: these depend on x and weight
            z, sigma = functional.linear(x, weight), torch.dot(u, weight.mv(v))
        gs = g / sigma
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = gs @ weight
        if _wants_weight(ctx):
            ctx.memory.forget()
            by_weight = _rows(gs).t() @ _rows(x)
            scale = (gs * z).sum().div(sigma) * u
            by_weight.addr_(scale, v, alpha=-1)  # in place: no second matrix of this size
        if ctx.needs_input_grad[2]:
            by_bias = _rows(g).sum(0)
        return by_x, by_weight, by_bias, None, None, None, None


def _rows(batch: Tensor) -> Tensor:
    return batch if batch.dim() == 2 else batch.reshape(-1, batch.shape[-1])


def _divided(z: Tensor, sigma: Tensor, bias: Tensor | None) -> Tensor:
    return z / sigma if bias is None else torch.addcdiv(bias, z, sigma)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of a linear layer."""
    if _is_autocast(x):
        # the weight in full precision by sigma in full precision, then what autocast does
        return functional.linear(x, layer.weight, layer.bias)
    parameters = _parametrisation(layer)
    norm, weight, bias = parameters[0], parameters.original, layer.bias
    if not _is_ordinary(weight):
        return _divided(functional.linear(x, weight), norm.sigma(weight), bias)
    found = norm.vectors(weight)
    if not torch.is_grad_enabled():
        return _divided(functional.linear(x, weight), found[2], bias)
    y: Tensor = _DividedOutput.apply(x, weight, bias, *found, norm._memory)  # type: ignore[no-untyped-call]
    return y


def _divide_outputs(layer: nn.Module) -> None:
    """Gives a layer with the forward pass of `nn.Linear` the one above."""
    cls = type(layer)
    if cls.forward is not nn.Linear.forward:
        return
    # A class of its own, beside torch's: copies of the layer made before have torch's still.
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(cls.__name__, cls.__bases__, {**namespace, "forward": _linear})


def _is_autocast(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _full_precision(weight: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from the products with the weight."""
    if _is_autocast(weight):
        return torch.autocast(weight.device.type, enabled=False)
    return nullcontext()


def _parametrisation(layer: nn.Module) -> Any:
    return layer.parametrizations.weight  # type: ignore[union-attr]


def _is_ordinary(weight: Tensor) -> bool:
    """Tells whether a node of our own, and a memory, can serve here."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
        or type(weight) not in (Tensor, nn.Parameter)  # sharded, fake
    )


def _wants_weight(ctx: Any) -> bool:
    """Tells whether this backward pass asks for the weight's gradient.

    `needs_input_grad` alone is true too where `backward(inputs=...)` leaves the weights out.
    """
    if not ctx.needs_input_grad[1]:
        return False
    try:
        wanted: bool = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError:  # autograd.grad asks for this very leaf
        return True
    return wanted


def _check(name: str, layer: nn.Module) -> None:
    """Raises where a weight is not the layer's own."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise ValueError(
            f"spectral_norm: {name} is lazy and has no weight yet. "
            "Run a batch through the network first."
        )
    if parametrize.is_parametrized(layer, "weight"):
        kinds = [type(p) for p in _parametrisation(layer)]
        if len(kinds) != 1 or not issubclass(kinds[0], parametrizations._SpectralNorm):
            raise ValueError(
                f"spectral_norm: the weight of {name} is parametrised already, by "
                f"{', '.join(kind.__name__ for kind in kinds)}. Remove that with "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
            )
    elif hasattr(layer, "weight_orig") and hasattr(layer, "weight_u"):
        raise ValueError(
            f"spectral_norm: {name} has the legacy torch.nn.utils.spectral_norm. Remove it with "
            "torch.nn.utils.remove_spectral_norm(layer)."
        )
    elif not isinstance(layer.weight, nn.Parameter):
        raise ValueError(
            f"spectral_norm: the weight of {name} is no parameter; something computes it "
            "(weight_norm, pruning). Remove that first."
        )
