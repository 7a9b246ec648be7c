"""The training engine in one process: exact resumption, and the options of speed and method."""

import contextlib
import functools
import os
import signal

import pytest
import tiny_gans
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_gans import assert_equal_states, full_state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from factordisc import Observations
from support.training import Machine, Run


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MODELS = pytest.mark.parametrize("make", [tiny_gans.factorgan, tiny_gans.cyclegan])


def run_of(training, folder, **options):
    draw = lambda _: torch.zeros(4, 4, 3).numpy()  # noqa: E731
    return Run(training, folder, {"n": 1}, lambda _: {"score": 2.0}, draw, **options)


def recorded_gradients(training):
    """Keeps the gradients that the optimisers see, by side and parameter."""
    seen = {}
    for side, optimiser in training.optimisers.items():

        def step(closure=None, side=side, step=optimiser.step):
            named = getattr(training, side).named_parameters()
            seen[side] = {name: p.grad.clone() for name, p in named}
            step()

        optimiser.step = step
    return seen


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


# --- stopping and going on ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@MODELS
def test_a_signal_saves_and_a_resumed_run_ends_bit_equal(make, number, tmp_path):
    """With all that has a state: pool, average, scaler, dropout, every global generator."""
    make = functools.partial(make, Machine("cpu", precision="16-mixed"), average=0.9, pool=6)
    whole = make()
    assert run_of(whole, tmp_path / "whole").train(12, 3)
    stopped = make()
    step = stopped.step

    def step_and_stop(report=False):
        if stopped.update == 5:
            os.kill(os.getpid(), number)
        return step(report=report)

    stopped.step = step_and_stop
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert not run_of(stopped, tmp_path / "parts").train(12, 3)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert stopped.update == 6
    resumed = make()
    torch.manual_seed(1234)  # what another process would have
    run = run_of(resumed, tmp_path / "parts")
    run.resume()
    assert resumed.update == 6
    assert run.train(12, 3)
    assert_equal_states(full_state(whole), full_state(resumed))


def test_a_second_signal_stops_at_once(tmp_path):
    training = tiny_gans.factorgan()

    def step(report=False):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    training.step = step
    # a process that was started in the background ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_of(training, tmp_path).train(3, 1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_checkpoint_of_other_settings_is_refused_and_a_longer_run_is_not(tmp_path):
    run_of(tiny_gans.factorgan(), tmp_path).train(2, 1)
    other = run_of(tiny_gans.factorgan(), tmp_path)
    other.settings = {"n": 2}
    with pytest.raises(ValueError, match=r"a run with n 1, but this one has 2\. Choose another"):
        other.resume()


def test_a_folder_is_trained_in_by_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("support.claims.PATIENCE", 0.1)
    first, second = (run_of(tiny_gans.factorgan(), tmp_path) for _ in range(2))
    first.resume()
    for act in (second.resume, lambda: second.train(2, 1)):
        with pytest.raises(SystemExit, match=f"Another process is training the run in {tmp_path}"):
            act()
    first.train(2, 1)
    second.resume()
    assert second.training.update == 2


def test_checkpoints_are_written_every_so_many_minutes_and_at_the_end(tmp_path):
    for minutes, number in ((0.0, 4), (5.0, 1)):
        run = run_of(tiny_gans.factorgan(), tmp_path / str(minutes), checkpoint_minutes=minutes)
        saved, save = [], run.save

        def counting(saved=saved, save=save, run=run):
            saved.append(run.training.update)
            save()

        run.save = counting
        run.train(3, 1)
        assert saved == [1, 2, 3, 3][-number:]


def test_a_run_logs_scores_terms_and_samples_in_colour(tmp_path):
    run_of(tiny_gans.factorgan(), tmp_path, log_every=2).train(4, 2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("score/score")] == [0, 2, 4]
    assert [e.step for e in events.Scalars("p_dependency/accuracy")] == [2, 4]
    assert [e.step for e in events.Scalars("generator/loss")] == [2, 4]
    assert [(e.step, e.width) for e in events.Images("samples")] == [(0, 4), (2, 4), (4, 4)]


# --- what the generator learns from ---


def test_a_regulariser_is_added_to_the_generators_loss():
    def training(regulariser):
        made = tiny_gans.factorgan(regulariser=regulariser)
        seen = recorded_gradients(made)
        return made.step(report=True)["generator"], seen["generator"]

    def weights(generator, real, fake):
        assert fake.shape == (tiny_gans.BATCH, 2, 8, 8)
        assert real["joint"].shape == (tiny_gans.BATCH, 2, 8, 8)
        return sum(p.sum() for p in generator.parameters())

    loss, gradients = training(None)
    other, others = training(lambda generator, real, fake: None)
    assert loss == other
    assert_equal_states(gradients, others)
    total = sum(p.sum() for p in tiny_gans.factorgan().generator.parameters())
    loss_with, gradients_with = training(weights)
    assert_close(loss_with, loss + total.detach())
    assert_close(gradients_with, {name: g + 1 for name, g in gradients.items()})


@MODELS
def test_the_generators_step_leaves_no_gradient_in_the_discriminators(make):
    training = make()
    seen = recorded_gradients(training)
    training.step()
    left = {name: p.grad for name, p in training.discriminator.named_parameters()}
    assert_equal_states(left, seen["discriminator"])


def test_the_average_moves_as_its_decay_says_and_is_the_result():
    training = tiny_gans.factorgan(average=0.75)
    states = []
    for _ in range(3):
        training.step()
        states.append({n: p.detach().clone() for n, p in training.generator.named_parameters()})
    first, second, third = states  # an average starts with the first
    expected = {n: 0.75 * (0.75 * first[n] + 0.25 * second[n]) + 0.25 * third[n] for n in first}
    assert_close(dict(training.result.named_parameters()), expected)
    assert tiny_gans.factorgan().result is not training.result
    assert training.result is not training.generator
    without = tiny_gans.factorgan()
    assert without.result is without.generator


def test_discriminators_see_fakes_of_the_pool_and_the_generator_its_own():
    training = tiny_gans.factorgan(pool=6)
    shown, learned = [], []
    criterion, pool = training._discriminator_loss, training.pool
    rows = criterion.rows
    criterion.rows = lambda real, fake: learned.append(fake) or rows(real, fake)
    training.pool = lambda fake: shown.append(pool(fake)) or shown[-1]
    for _ in range(4):
        training.step()
    assert len(shown) == 8
    assert_equal_states(shown, learned)


# --- clipping ---


def test_clipping_bounds_the_norm_of_each_network_by_itself():
    def gradients(clip, machine=tiny_gans.CPU):
        training = tiny_gans.factorgan(machine, clip=clip)
        seen = recorded_gradients(training)
        training.discriminator_updates = 1
        training.step()
        by_network = {"generator": list(seen["generator"].values())}
        for name, gradient in seen["discriminator"].items():
            by_network.setdefault(name.split(".")[1], []).append(gradient)
        return by_network

    free = gradients(0.0)
    norms = {name: norm(g) for name, g in free.items() if name != "generator"}
    small, large = min(norms, key=norms.get), max(norms, key=norms.get)
    bound = float((norms[small] + norms[large]) / 2)
    clipped = gradients(bound)
    assert_close(clipped[small], free[small], rtol=0.0, atol=0.0)
    factor = bound / norms[large]
    assert_close(clipped[large], [factor * g for g in free[large]])
    assert_close(norm(gradients(1e-4)["generator"]), torch.tensor(1e-4), rtol=1e-2, atol=0.0)
    # the norm is that of the gradients themselves, not of the scaled ones
    half = gradients(bound, Machine("cpu", precision="16-mixed"))
    assert norm(half[large]) == pytest.approx(bound, rel=1e-2)
    assert norm(half[small]) == pytest.approx(float(norms[small]), rel=0.05)


# --- options of speed ---


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@MODELS
def test_half_precision_is_that_of_the_networks_not_of_weights_and_losses(make, precision):
    training, full = make(Machine("cpu", precision=precision)), make()
    kinds = set()
    for module in (training.generator, training.discriminator):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda m, x, y: kinds.add(y.dtype))
    report, expected = training.step(report=True), full.step(report=True)
    assert kinds == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    assert report["generator"].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in training.generator.parameters())
    # a step with 8 bits of mantissa, and Adam's first steps, which are of the learning rate
    assert_close(report["generator"], expected["generator"], rtol=0.05, atol=0.0)


def test_an_overflow_in_half_precision_skips_the_update_and_halves_the_scale():
    training = tiny_gans.factorgan(Machine("cpu", precision="16-mixed"))
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**60})
    before = full_state(training)
    training.step()
    after = full_state(training)
    for side in ("generator", "discriminator"):
        names = dict(getattr(training, side).named_parameters())
        assert_equal_states(
            {n: before[side][n] for n in names}, {n: after[side][n] for n in names}
        )
    assert after["scaler"]["scale"] == 2.0**57  # two updates of one side, one of the other
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 1.0})
    training.step()
    assert not torch.equal(
        full_state(training)["generator"]["layers.0.weight"], after["generator"]["layers.0.weight"]
    )


def test_channels_last_changes_nothing_but_the_layout():
    training = tiny_gans.factorgan(Machine("cpu", channels_last=True))
    plain = tiny_gans.factorgan()
    seen, expected = recorded_gradients(training), recorded_gradients(plain)
    weights = [p for p in training.generator.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    loss, other = (t.step(report=True)["generator"] for t in (training, plain))
    assert_close(loss, other)
    assert_close(seen, expected, rtol=1e-3, atol=1e-5)  # sums in another order


@contextlib.contextmanager
def counting_backend(monkeypatch):
    """Compiles without the minutes of a C++ compiler, and counts the graphs."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=backend))
    yield backend
    monkeypatch.undo()
    torch._dynamo.reset()


# torch's own tracer looks at .grad of the tensors that it meets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_once_whatever_a_step_lacks(monkeypatch):
    def lacking(training):
        for step, real in enumerate(training.loader):
            yield Observations({k: v for k, v in real.items() if k != "joint" or step % 2})

    def losses(machine):
        training = tiny_gans.factorgan(machine)
        training._observations = lacking(training)
        return [training.step(report=True)["generator"] for _ in range(2)]

    with counting_backend(monkeypatch) as backend:
        compiled = losses(Machine("cpu", compile=True))
    # the generator with and without gradient, the discriminator, the cost
    assert backend.frame_count == 4
    assert_close(compiled, losses(tiny_gans.CPU), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_members_of_a_generator_are_compiled(monkeypatch):
    with counting_backend(monkeypatch) as backend:
        training = tiny_gans.cyclegan(Machine("cpu", compile=True))
        compiled = training.step(report=True)["generator"]
    # the U-Nets, which share their graphs, without gradient, with it, and with that of their
    # input too; the discriminator; the cost
    assert backend.frame_count == 5
    assert_close(compiled, tiny_gans.cyclegan().step(report=True)["generator"], rtol=0.2, atol=0.0)
    assert not any("_orig_mod" in name for name in training.state_dict()["result"])
