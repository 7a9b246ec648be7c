"""What every docstring example and every test of the repository may use."""

import pytest
import torch

import factordisc


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace["nn"] = torch.nn
    for name in factordisc.__all__:
        doctest_namespace[name] = getattr(factordisc, name)


@pytest.fixture(autouse=True)
def _global_state() -> object:
    """Seeds the global generator, and fails no later test by what this one has set."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)
