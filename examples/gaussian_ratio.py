"""A check of the idea itself: the log ratio of two Gaussians, learned from incomplete data.

Two parts of four dimensions are correlated under p, the data, and less so under q; their means
differ. log p(x) - log q(x) has a closed form. A joint classifier sees n pairs and as many draws of
q as it wants; a factorised one sees in addition many observations of each part alone. Both are
compared with the truth on held-out points, by correlation and mean absolute error in nats.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn.utils.parametrizations import spectral_norm
from tqdm.auto import tqdm

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Partition,
)
from support import figures
from support.results import environment, table, write_json

SIZE = 4  # dimensions of each part
COLUMNS = {"model": "", "pairs": "", "seed": "", "correlation": ".3f", "error": ".3f"}


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    singles: int = 10_000
    """Incomplete observations of each part."""
    updates: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    """Of AdamW, with its default weight decay of 0.01."""
    width: int = 64
    held_out: int = 10_000
    """Points for the comparison, half from p and half from q."""


def make_problem() -> tuple[MultivariateNormal, MultivariateNormal]:
    """Returns p and q over (left, right): different means, and correlations 0.7 and 0.2."""
    identity = torch.eye(SIZE)

    def normal(mean: float, correlation: float) -> MultivariateNormal:
        rows = [torch.cat([identity, correlation * identity], 1)]
        rows += [torch.cat([correlation * identity, identity], 1)]
        return MultivariateNormal(torch.full((2 * SIZE,), mean), torch.cat(rows))

    return normal(0.35, 0.7), normal(-0.35, 0.2)


def make_network(inputs: int, width: int) -> nn.Module:
    """An MLP whose hidden layers are spectrally normalised; the last is free in its scale."""
    return nn.Sequential(
        spectral_norm(nn.Linear(inputs, width)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(width, width)),
        nn.LeakyReLU(0.2),
        nn.Linear(width, 1),
    )


def learn(model: str, pairs: int, seed: int, settings: Settings) -> dict[str, Any]:
    """Trains one estimate of the log ratio and compares it with the truth."""
    p, q = make_problem()
    torch.manual_seed(seed)
    partition = Partition({"left": SIZE, "right": SIZE})
    datasets = {"joint": p.sample((pairs,))}
    if model == "joint":
        factorisation = Factorisation.joint(partition.names)
    else:
        factorisation = Factorisation.flat(partition.names)
        for name in partition.names:
            datasets[name] = partition.take(p.sample((settings.singles,)), name)
    networks = {
        term.name: make_network(len(term.parts) * SIZE, settings.width)
        for term in factorisation.terms
    }
    d = FactorisedDiscriminator(partition, factorisation, networks)
    criterion = DiscriminatorLoss(d, DependencySampler(partition))
    optimiser = torch.optim.AdamW(d.parameters(), lr=settings.learning_rate, fused=True)
    with warnings.catch_warnings():
        # Fewer pairs than a batch are what this script is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        loader = iter(ObservationLoader(datasets, partition, settings.batch_size))
    for _ in range(settings.updates):
        optimiser.zero_grad()
        criterion(next(loader), q.sample((settings.batch_size,))).backward()
        optimiser.step()
    x = torch.cat([p.sample((settings.held_out // 2,)), q.sample((settings.held_out // 2,))])
    truth = p.log_prob(x) - q.log_prob(x)
    with torch.no_grad():
        estimate = d.eval()(x)
    return {
        "model": model,
        "pairs": pairs,
        "seed": seed,
        "correlation": torch.corrcoef(torch.stack([truth, estimate]))[0, 1].item(),
        "error": (truth - estimate).abs().mean().item(),
    }


def compare(
    settings: Settings = Settings(),
    pairs: tuple[int, ...] = (20, 50, 100, 200, 500, 1000),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = Path("out/gaussian_ratio"),
) -> None:
    """Trains both models for all numbers of pairs and seeds; draws and prints the comparison.

    Args:
        settings: What all runs share.
        pairs: The numbers of complete observations.
        seeds: The seeds of data and training.
        out: Where results.json and figure.png are written.
    """
    grid = [(m, n, seed) for seed in seeds for n in pairs for m in ("joint", "factorised")]
    rows = [learn(m, n, seed, settings) for m, n, seed in tqdm(grid, unit="run")]
    write_json(out / "results.json", {"rows": rows, **asdict(settings), **environment()})
    draw_ratio_errors(rows, out / "figure.png")
    print(table(rows, COLUMNS))


def draw_ratio_errors(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws how well a joint and a factorised classifier recover a log ratio, against pairs."""
    figure, axes = figures.plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = {"correlation": "correlation with the truth", "error": "mean absolute error (nats)"}
    colours = {"joint": figures.COLOURS["gan"], "factorised": figures.COLOURS["factorgan"]}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for model, colour in colours.items():
            chosen = [row for row in rows if row["model"] == model]
            figures.draw_against(axis, chosen, "pairs", key, model, colour)
        axis.set(xscale="log", xlabel="complete observations (pairs)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(
        "log p − log q of two Gaussians on held-out points (mean and range over seeds)"
    )
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(compare, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
