"""Networks of one architecture, evaluated as one: their parameters lie in stacks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_map

from factordisc.layouts import Tensors
from factordisc.regularisers import SpectralNorm, iterate

__all__: list[str] = []

# Layers that do to a stack what they do to its rows one by one.
_ENTRYWISE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
    nn.Dropout,
    nn.Identity,
)


class Stack(nn.Module):
    """K networks of one architecture, whose parameters are stacked: each has K rows.

    The state dict is that of the networks: their places in a discriminator are taken by
    `Stacked`, which saves and loads the rows.

    Args:
        networks: The networks by term; they are copied.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        first = next(iter(networks.values()))
        self.names = [name for name, _ in first.named_parameters()]
        self.buffer_names = [name for name, _ in first.named_buffers()]
        for i, name in enumerate(self.names):
            weights = [network.get_parameter(name) for network in networks.values()]
            stacked = torch.stack([weight.detach() for weight in weights])
            self.register_parameter(
                f"weight_{i}", nn.Parameter(stacked, requires_grad=weights[0].requires_grad)
            )
        for i, name in enumerate(self.buffer_names):
            buffers = [network.get_buffer(name) for network in networks.values()]
            self.register_buffer(f"buffer_{i}", torch.stack(buffers))
        # Not a submodule: it lends its structure, and its own tensors are never used.
        self._template = (copy.deepcopy(first).to("meta"),)
        self._chosen: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._is_dense = isinstance(first, nn.Sequential) and all(
            type(layer) in (nn.Linear, *_ENTRYWISE) for layer in first
        )

    def stacked(self) -> dict[str, Tensor]:
        """Returns the stacks of parameters and buffers by their names in a network."""
        weights = {name: getattr(self, f"weight_{i}") for i, name in enumerate(self.names)}
        buffers = {n: getattr(self, f"buffer_{i}") for i, n in enumerate(self.buffer_names)}
        return weights | buffers

    def forward(self, rows: Sequence[int], arguments: Tensors, gate: Tensor | None = None) -> Any:
        """Evaluates some of the networks at once.

        Args:
            rows: The numbers of the networks.
            arguments: What they are called with, with shape (number of rows, N, *).
            gate: Weights of the rows, 0 or 1: those of weight 0 get gradients of exactly zero.

        Returns:
            What they return, stacked.
        """
        (template,) = self._template
        template.train(self.training)
        if self.training:
            self._iterate(template)
        tensors = self.stacked()
        if len(rows) < len(next(iter(tensors.values()))):
            chosen = self._numbers(tuple(rows), arguments[0].device)
            tensors = {name: tensor.index_select(0, chosen) for name, tensor in tensors.items()}
        if gate is not None:
            tensors = {name: gated(tensor, gate) for name, tensor in tensors.items()}
        if self._is_dense and arguments[0].dim() == 3:
            return _dense(template, tensors, arguments[0])
        call = partial(torch.func.functional_call, template)
        return torch.vmap(call, randomness="different")(tensors, arguments)

    def _numbers(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():  # what a graph makes is not kept: a side effect
            return torch.tensor(rows, device=device)
        key = (rows, device)
        if key not in self._chosen:
            self._chosen[key] = torch.tensor(rows, device=device)
        return self._chosen[key]

    @torch.no_grad()
    def _iterate(self, template: nn.Module) -> None:
        """Steps the power iterations of all rows at once."""
        tensors = self.stacked()
        for path, layer in template.named_modules():
            if not isinstance(layer, SpectralNorm):
                continue
            u, v = tensors[f"{path}._u"], tensors[f"{path}._v"]
            weight = tensors[f"{path.removesuffix('.0')}.original"]
            matrix = weight if layer.dim == 0 else weight.movedim(layer.dim + 1, 1)
            new_u, new_v, _ = iterate(matrix.flatten(2), u, v, layer.eps)
            u.copy_(new_u)
            v.copy_(new_v)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves nothing: `Stacked` does."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Loads nothing: `Stacked` does."""


def _dense(template: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Evaluates multi-layer perceptrons: half the time that torch.vmap takes for them."""
    for name, layer in template._modules.items():  # one activation may stand in several places
        if not isinstance(layer, nn.Linear):
            x = cast(nn.Module, layer)(x)
        elif layer.bias is None:
            x = torch.bmm(x, tensors[f"{name}.weight"].mT)
        else:
            x = torch.baddbmm(tensors[f"{name}.bias"][:, None], x, tensors[f"{name}.weight"].mT)
    return x


class Stacked(nn.Module):
    """The place of one network of a stack: it evaluates, saves and loads its row."""

    def __init__(self, of: Stack, stack: str, row: int, architecture: str) -> None:
        super().__init__()
        self._of = (of,)  # not a submodule, since all rows have the same one
        self.stack = stack
        self.row = row
        self.architecture = architecture

    def forward(self, *arguments: Tensor) -> Any:
        (of,) = self._of
        return unstacked(of([self.row], tuple(argument[None] for argument in arguments)), 1)[0]

    def own(self) -> Iterable[Tensor]:
        """Its own row of every parameter."""
        return (parameter[self.row] for parameter in self._of[0].parameters())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._of[0].stacked().items():
            row = tensor[self.row]
            destination[prefix + name] = row if keep_vars else row.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name: t[self.row] for name, t in self._of[0].stacked().items()}
        missing_keys += [key for key in own if key not in state_dict]
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in own]
        for key, row in own.items():
            saved = state_dict.get(key, row)
            if saved.shape != row.shape:
                error_msgs.append(
                    f"size mismatch for {key}: {tuple(saved.shape)} in the state dict, but "
                    f"{tuple(row.shape)} here."
                )
                continue
            with torch.no_grad():
                row.copy_(saved)

    def extra_repr(self) -> str:
        """Names the architecture."""
        return f"{self.architecture}, row {self.row} of stack {self.stack!r}"


def unstacked(output: Any, number: int) -> list[Any]:
    """Takes what a stack returned apart: tensors, or any structure of them, by row."""
    if isinstance(output, Tensor):
        return list(output.unbind())
    return [tree_map(lambda tensor, k=k: tensor[k], output) for k in range(number)]


def gated(tensor: Tensor, weight: Tensor) -> Tensor:
    """Returns the tensor itself, whose gradient is exactly zero in rows of weight 0."""
    gate = tensor.view_as(tensor)
    if gate.requires_grad and not torch.compiler.is_compiling():
        shape = (*weight.shape, *[1] * (tensor.dim() - weight.dim()))
        # Zero outputs are not enough, since 0 * NaN is NaN on the way back.
        gate.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: torch.where(weight.reshape(shape) > 0, gradient, 0.0)
        )
    return gate


def alike(networks: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Groups terms whose networks have one architecture, and can be stacked.

    Raises:
        ValueError: If a network cannot be stacked, or no two are alike.
    """
    groups: dict[object, list[str]] = {}
    for name, network in networks.items():
        reason = _reason(network)
        if reason:
            raise ValueError(
                f"The network of term {name!r} cannot be stacked: {reason} "
                "Leave `stack` out, or change the network."
            )
        shapes = tuple(
            (key, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
            for key, tensor in [*network.named_parameters(), *network.named_buffers()]
        )
        groups.setdefault((str(network), shapes), []).append(name)
    several = {names[0]: names for names in groups.values() if len(names) > 1}
    if not several:
        raise ValueError(
            "`stack` evaluates networks of one architecture as one, but no two of the networks "
            f"of {tuple(networks)} are alike. Leave it out."
        )
    return several


def _reason(network: nn.Module) -> str:
    """Says why a network cannot be one of a stack; nothing if it can."""
    for path, module in network.named_modules():
        where = f"its module {path!r}" if path else "it"
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and (
            module.has_uninitialized_params()  # type: ignore[misc]
        ):
            return f"{where} is lazy and has no parameters yet; run a batch through it first."
        if getattr(module, "track_running_stats", False):
            return (
                f"{where} keeps running statistics of its batches, which cannot be written "
                "through torch.vmap; pass track_running_stats=False, or use another norm."
            )
        if isinstance(module, nn.RNNBase):
            return f"{where} is a recurrent layer, which torch.vmap does not know."
        if type(module) is parametrizations._SpectralNorm:
            return (
                f"{where} is torch's spectral norm, which does not run under torch.vmap in "
                "training; use factordisc.spectral_norm(network)."
            )
        if hasattr(module, "weight_orig") and not parametrize.is_parametrized(module):
            return (
                f"{where} has the legacy torch.nn.utils.spectral_norm, which is silently wrong "
                "under torch.vmap; use factordisc.spectral_norm(network)."
            )
    if not list(network.parameters()):
        return "it has no parameters, so there is nothing to stack."
    return ""
