"""Two processes on the CPU that train one run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gans
import torch
import two_processes
from torch.testing import assert_close

from factordisc import DiscriminatorLoss, Observations, generator_loss
from factordisc.losses import TermRows
from support.training import Machine

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saw, and the folder that they wrote."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(HERE / "two_processes.py"), str(folder)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "examples")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, results


@pytest.fixture(scope="module")
def seen(ranks):
    return [result["gradients"] for result in ranks[1]]


def joined(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_marginals_get_the_gradients_of_one_process_with_the_joined_batch(seen):
    d = tiny_gans.factorgan(normalise=False).discriminator
    real = Observations(joined([each["real"] for each in seen]))
    DiscriminatorLoss(d)(real, torch.cat([each["fake"] for each in seen])).backward()
    expected = {n: p.grad for n, p in d.named_parameters() if n.split(".")[1] in ("a", "b")}
    assert len(expected) == 12
    assert min(float(g.abs().max()) for g in expected.values()) > 1e-4
    for each in seen:
        # the order of sums differs
        assert_close({name: each["discriminator"][name] for name in expected}, expected)


def test_dependencies_get_those_of_one_process_that_is_handed_the_same_rows(seen):
    d = tiny_gans.factorgan(normalise=False).discriminator
    criterion = DiscriminatorLoss(d)
    rows = criterion.rows(Observations(seen[0]["real"]), seen[0]["fake"])  # for their form
    rows = {
        name: TermRows(
            [torch.cat([each["rows"][name][0][i] for each in seen]) for i in range(2)],
            term.weight,
        )
        for name, term in rows.items()
    }
    criterion.cost(rows).backward()
    expected = {name: p.grad for name, p in d.named_parameters()}
    assert len(expected) == 24
    for each in seen:
        assert_close(each["discriminator"], expected)


def test_the_generator_gets_the_gradient_of_one_process_with_the_joined_noise(seen):
    training = tiny_gans.factorgan(normalise=False)
    training.discriminator.load_state_dict(seen[0]["after discriminator"])
    noise = torch.cat([each["noise"] for each in seen])
    generator_loss(training.discriminator(training.generator(noise))).backward()
    expected = {name: p.grad for name, p in training.generator.named_parameters()}
    assert min(float(g.abs().max()) for g in expected.values()) > 1e-6
    for each in seen:
        assert_close(each["generator"], expected)


def test_each_process_has_data_noise_and_rows_of_its_own_and_the_same_weights(seen):
    one, other = seen
    assert one["loader seed"] == tiny_gans.factorgan().loader.seed  # the first's is the run's
    assert one["loader seed"] != other["loader seed"]
    for batch in ("noise", "fake"):
        assert not torch.equal(one[batch], other[batch])
    assert not torch.equal(one["real"]["a"], other["real"]["a"])
    for side in ("after discriminator", "after generator"):
        tiny_gans.assert_equal_states(one[side], other[side])


def test_a_process_without_pairs_in_a_step_does_not_hang_the_other(ranks):
    one, other = (result["lacking"] for result in ranks[1])
    assert one["lacked"] == [False] * 3
    assert other["lacked"] == [True] * 3  # of two steps per update the second is reported
    tiny_gans.assert_equal_states(one["discriminator"], other["discriminator"])


def test_sigterm_at_one_process_stops_both_at_one_update_and_resuming_is_exact(ranks):
    folder, results = ranks
    for result in results:
        assert result["whole"]["done"]
        stopped, resumed = result["stopped"], result["resumed"]
        assert stopped["ended"] == two_processes.STOPPED + 1  # the update of the signal ends
        assert (stopped["done"], resumed["done"]) == (False, True)
        assert (stopped["begun"], resumed["begun"]) == (0, stopped["ended"])
        resumed["begun"] = 0
    # what is written; batch statistics of the other process count nowhere
    tiny_gans.assert_equal_states(results[0]["whole"], results[0]["resumed"])
    for key in ("discriminator", "optimisers", "processes", "history"):
        tiny_gans.assert_equal_states(results[1]["whole"][key], results[1]["resumed"][key])
    assert results[0]["whole"]["scaler"]["scale"] > 0
    own = results[0]["whole"]["processes"]
    assert len(own) == 2
    assert not torch.equal(own[0]["pool"]["stored"][0], own[1]["pool"]["stored"][0])
    # dropout, and what users' code draws from, differs between processes
    assert not torch.equal(own[0]["global_rngs"]["torch"], own[1]["global_rngs"]["torch"])
    assert own[0]["global_rngs"]["python"] != own[1]["global_rngs"]["python"]
    assert len(list((folder / "whole").glob("events*"))) == 1


def test_a_checkpoint_of_two_processes_is_not_for_one(ranks):
    saved = torch.load(ranks[0] / "whole" / "checkpoint.pt", weights_only=True)
    training = tiny_gans.cyclegan(Machine("cpu", precision="16-mixed"), average=0.9, pool=6)
    with pytest.raises(ValueError, match="done by 2 processes, but now there are 1"):
        training.load_state_dict(saved["training"])
