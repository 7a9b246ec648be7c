import re
import subprocess
import sys
from pathlib import Path

import pytest

import factordisc

ROOT = Path(__file__).parents[1]
NAMES = [
    "Density",
    "DependencySampler",
    "DiscriminatorLoss",
    "Factorisation",
    "FactorisedDiscriminator",
    "GradientPenalty",
    "Logistic",
    "ObservationLoader",
    "Observations",
    "Partition",
    "Ratio",
    "diagnostics",
    "generator_loss",
    "independent",
    "markov",
    "shared",
    "spectral_norm",
]


def test_all_is_the_pinned_list_and_sorted():
    assert factordisc.__all__ == NAMES
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_and_has_a_docstring_of_its_own(name):
    value = getattr(factordisc, name)
    if name == "diagnostics":  # a module
        value = value.diagnose
    assert value.__module__.startswith("factordisc.")
    # A dataclass without a docstring gets its signature for one.
    assert len(value.__doc__) > len(name) + 40
    assert "\n\n    Args:" in value.__doc__ or name == "Logistic"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", factordisc.__version__)


def loaded(statement):
    program = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


def test_importing_loads_nothing_that_its_requirements_do_not():
    before = loaded("import torch, torch.utils.data, numpy")
    more = loaded("import factordisc") - before
    packages = {name.split(".")[0] for name in more} - {name.split(".")[0] for name in before}
    assert packages - sys.stdlib_module_names == {"factordisc"}
    assert "torch._dynamo" not in more  # 800 modules and a second


def test_the_quickstart_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    quickstart = [block for block in blocks if "FactorisedDiscriminator(" in block]
    if not quickstart:
        pytest.skip("README.md has no block with FactorisedDiscriminator( yet")
    names = {"__name__": "readme"}
    exec(compile(quickstart[0], "README.md", "exec"), names)
    generator, d = names["generator"], names["d"]
    assert all(bool((p.grad != 0).any()) for p in (*generator.parameters(), *d.parameters()))
