"""ObservationLoader against what a fair, endless, resumable stream must be."""

import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from factordisc import ObservationLoader, Partition

PARTITION = Partition({"a": 1, "b": 2, "c": 1})


def numbered(start, number, columns):
    """Rows whose first entry is their number."""
    return torch.arange(start, start + number).unsqueeze(1).repeat(1, columns)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Augmented(Dataset):
    """Samples that depend on every global generator, as users' transforms do."""

    def __init__(self, number, columns):
        self.number = number
        self.columns = columns

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        noise = torch.rand(self.columns, dtype=torch.float64)
        return noise + index + random.random() + np.random.rand()  # noqa: NPY002


def take(loader, steps):
    stream = iter(loader)
    return [next(stream) for _ in range(steps)]


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=40)
def test_an_epoch_shows_every_observation_at_most_once_and_a_batch_never_repeats(
    sizes, batch_size, seed
):
    datasets = {"a": numbered(0, sizes[0], 1), "b": numbered(0, sizes[1], 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = ObservationLoader(datasets, PARTITION, batch_size, rng=seeded(seed))
    steps = take(loader, 12)
    for part, size in zip("ab", sizes, strict=True):
        batches = [real[part][:, 0].tolist() for real in steps]
        assert {len(batch) for batch in batches} == {min(batch_size, size)}
        per_epoch = max(1, size // batch_size)
        for start in range(0, len(batches), per_epoch):
            epoch = [row for batch in batches[start : start + per_epoch] for row in batch]
            assert len(set(epoch)) == len(epoch)


def test_epochs_are_reshuffled_and_patterns_have_their_own():
    datasets = {"a": numbered(0, 64, 1), "b": numbered(0, 64, 2)}
    steps = take(ObservationLoader(datasets, PARTITION, 64, rng=seeded()), 2)
    orders = [real[part][:, 0].tolist() for real in steps for part in "ab"]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_pooling_draws_in_proportion_and_crops_what_is_larger():
    # 30 whole observations, 20 of (a, b), 50 of a alone: a is drawn from all 100.
    whole, pairs, lone = numbered(0, 30, 4), numbered(100, 20, 3), numbered(200, 50, 1)
    datasets = {"joint": whole, ("a", "b"): pairs, "a": lone}
    loader = ObservationLoader(datasets, PARTITION, 10, rng=seeded())
    steps = take(loader, 10)  # one epoch of a
    drawn = torch.cat([real["a"] for real in steps])
    assert drawn.shape == (100, 1)
    assert sorted(drawn.flatten().tolist()) == [*range(30), *range(100, 120), *range(200, 250)]
    both = torch.cat([real["a", "b"] for real in steps[:5]])
    assert sorted(both[:, 0].tolist()) == [*range(30), *range(100, 120)]
    assert (both == both[:, :1]).all()  # a crop keeps the entries of one observation together
    assert steps[0]["joint"].shape == (10, 4)


def test_without_pooling_every_pattern_reads_its_own_set_only():
    datasets = {"joint": numbered(0, 30, 4), "a": numbered(200, 50, 1)}
    loader = ObservationLoader(datasets, PARTITION, 10, pool=False, rng=seeded())
    drawn = torch.cat([real["a"] for real in take(loader, 5)])
    assert sorted(drawn.flatten().tolist()) == list(range(200, 250))


def test_a_pooled_batch_is_in_random_order():
    # Completes first would bias whoever reads the first rows of a batch.
    datasets = {"joint": numbered(0, 100, 4), "a": numbered(200, 100, 1)}
    loader = ObservationLoader(datasets, PARTITION, 50, rng=seeded())
    first_half = torch.cat([real["a"][:25] for real in take(loader, 40)])
    share = (first_half < 200).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / len(first_half) ** 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_mid_epoch_gives_the_same_batches(workers):
    def make(rng):
        datasets = {"joint": Augmented(30, 4), "a": Augmented(50, 1)}
        return ObservationLoader(datasets, PARTITION, 8, rng=rng, workers=workers)

    unbroken = take(make(seeded(3)), 9)
    first = make(seeded(3))
    take(first, 4)
    state = first.state_dict()
    resumed = make(seeded(99))
    resumed.load_state_dict(state)
    for ours, theirs in zip(take(resumed, 5), unbroken[4:], strict=True):
        for pattern in ("joint", "a"):
            assert torch.equal(ours[pattern], theirs[pattern])


def test_workers_give_what_this_process_gives():
    datasets = {"joint": Augmented(30, 4), "a": Augmented(50, 1)}
    ours = take(ObservationLoader(datasets, PARTITION, 8, rng=seeded()), 5)
    theirs = take(ObservationLoader(datasets, PARTITION, 8, rng=seeded(), workers=2), 5)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["a"], other["a"])
        assert torch.equal(one["joint"], other["joint"])


def test_random_transforms_differ_from_step_to_step():
    loader = ObservationLoader({"a": Augmented(1, 1)}, PARTITION, 1, rng=seeded())
    one, other = (real["a"] for real in take(loader, 2))  # the same sample twice
    assert not torch.equal(one, other)


def test_loading_leaves_the_global_generators_alone():
    loader = ObservationLoader({"a": Augmented(50, 1)}, PARTITION, 8, rng=seeded())
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    take(loader, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_breaking_off_and_iterating_again_loses_nothing():
    datasets = {"a": numbered(0, 40, 1)}
    unbroken = take(ObservationLoader(datasets, PARTITION, 8, rng=seeded()), 5)
    loader = ObservationLoader(datasets, PARTITION, 8, rng=seeded())
    again = take(loader, 2) + take(loader, 3)
    assert all(torch.equal(x["a"], y["a"]) for x, y in zip(unbroken, again, strict=True))
    assert loader.step == 5


def test_the_stream_is_not_that_of_the_order_of_the_mapping():
    datasets = {"joint": Augmented(30, 4), "a": Augmented(50, 1), ("c", "b"): Augmented(9, 3)}
    turned = dict(reversed(datasets.items()))
    one, other = (ObservationLoader(d, PARTITION, 4, rng=seeded()) for d in (datasets, turned))
    ours = take(one, 3)
    other.load_state_dict(one.state_dict())
    other.step = 0
    for real, again in zip(ours, take(other, 3), strict=True):
        for pattern in datasets:
            assert torch.equal(real[pattern], again[pattern])


def test_a_second_iteration_ends_the_first():
    loader = ObservationLoader({"a": numbered(0, 40, 1)}, PARTITION, 8, rng=seeded())
    unbroken = take(ObservationLoader({"a": numbered(0, 40, 1)}, PARTITION, 8, rng=seeded()), 2)
    first, second = iter(loader), iter(loader)
    next(first)
    assert torch.equal(next(second)["a"], unbroken[1]["a"])
    with pytest.raises(ValueError, match="Another iteration of this ObservationLoader has begun"):
        next(first)
    assert loader.step == 2


def test_a_small_set_comes_whole_with_one_warning():
    with pytest.warns(UserWarning, match="There are 3 observations of 'a', fewer than") as caught:
        loader = ObservationLoader({"a": numbered(0, 3, 1)}, PARTITION, 8, rng=seeded())
    assert len(caught) == 1
    assert all(sorted(r["a"].flatten().tolist()) == [0, 1, 2] for r in take(loader, 4))


def test_data_sets_of_tensors_tuples_and_mappings():
    fields = Partition.fields("scene", "label")
    scenes, labels = numbered(0, 12, 3), numbered(0, 12, 1)

    class Mappings(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {"label": labels[index], "scene": scenes[index].numpy()}

    for joint in (TensorDataset(scenes, labels), Mappings()):
        datasets = {"joint": joint, "scene": TensorDataset(scenes + 100)}
        steps = take(ObservationLoader(datasets, fields, 4, rng=seeded()), 6)
        for real in steps:
            scene, label = fields.take(real["joint"], fields.names)
            assert torch.equal(scene[:, :1], label)
        drawn = torch.cat([real["scene"][:, 0] for real in steps])
        assert sorted(drawn.tolist()) == [*range(12), *range(100, 112)]


def test_a_crop_does_not_hold_on_to_what_was_cut_away():
    datasets = {"joint": numbered(0, 9, 4), "a": numbered(100, 9, 1)}
    steps = take(ObservationLoader(datasets, PARTITION, 1, rng=seeded()), 18)
    crops = [real["a"] for real in steps if real["a"] < 100]
    assert len(crops) == 9
    assert all(crop.untyped_storage().nbytes() == crop.nbytes for crop in crops)


class Counted(Dataset):
    """Rows, and every call that asked for some."""

    def __init__(self, rows):
        self.rows = rows
        self.calls = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.calls.append(index)
        return self.rows[index]


class CountedTogether(Counted):
    def __getitems__(self, indices):
        self.calls.append(indices)
        return [self.rows[index] for index in indices]


def test_an_observation_that_several_patterns_want_is_loaded_once_a_step():
    # All of 8 whole observations are in every "joint", so those of "a" and "b" are among them.
    whole = Counted(numbered(0, 8, 4))
    datasets = {"joint": whole, "a": numbered(100, 8, 1), "b": numbered(200, 8, 2)}
    stream = iter(ObservationLoader(datasets, PARTITION, 8, rng=seeded()))
    cropped = 0
    for _ in range(6):
        whole.calls.clear()
        real = next(stream)
        assert sorted(whole.calls) == list(range(8))
        cropped += int((real["a"] < 100).sum() + (real["b"][:, 0] < 200).sum())
    assert cropped > 8


def test_samples_are_asked_for_together_once_in_a_step():
    whole, lone = (CountedTogether(numbered(100 * i, 40, c)) for i, c in enumerate((4, 1)))
    stream = iter(ObservationLoader({"joint": whole, "a": lone}, PARTITION, 16, rng=seeded()))
    for step in range(1, 7):
        real = next(stream)
        assert len(whole.calls) == len(lone.calls) == step
        drawn = {*real["joint"][:, 0].tolist(), *real["a"][:, 0].tolist()}
        assert sorted(whole.calls[-1] + [100 + i for i in lone.calls[-1]]) == sorted(drawn)


FORMS = {
    "mapping": lambda a, b: {"b": b.numpy(), "a": a},
    "tuple": lambda a, b: (a, b.numpy()),
    "list": lambda a, b: [a.numpy(), b],
    "number": lambda a, b: {"a": a[0].item(), "b": b},
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_samples_of_every_form_give_what_tensors_give(form, workers):
    fields = Partition.fields("a", "b")
    a, b, lone = numbered(0, 24, 1), numbered(0, 24, 2), numbered(100, 24, 1)
    samples = [FORMS[form](*row) for row in zip(a, b, strict=True)]
    if form == "number":
        a, lone = a[:, 0], lone[:, 0]
    ours, plain = (
        take(ObservationLoader({"joint": x, "a": y}, fields, 5, rng=seeded(), workers=w), 9)
        for x, y, w in (
            (Counted(samples), Counted(lone), workers),
            (TensorDataset(a, b), lone, 0),
        )
    )
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one["a"], other["a"])
        assert isinstance(one["joint"], tuple)  # which DataLoader would make a list
        assert all(map(torch.equal, one["joint"], other["joint"]))


def test_a_batch_is_not_the_memory_of_a_data_set():
    whole = [torch.tensor([i]) for i in range(8)]
    datasets = {"a": Counted(whole), "joint": numbered(100, 8, 4)}
    for real in take(ObservationLoader(datasets, PARTITION, 1, rng=seeded()), 20):
        real["a"].fill_(-1)
    assert whole == list(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_two_data_sets_give_of_a_pattern_has_the_larger_dtype(workers):
    datasets = {"joint": Counted(numbered(0, 8, 4)), "a": Counted(numbered(0, 8, 1) + 0.5)}
    loader = ObservationLoader(datasets, PARTITION, 8, rng=seeded(), workers=workers)
    drawn = torch.cat([real["a"] for real in take(loader, 12)])  # six epochs
    assert sorted(drawn.flatten().tolist()) == [i / 2 for i in range(16) for _ in range(6)]


def test_states_of_other_loaders_are_refused():
    loader = ObservationLoader({"a": numbered(0, 40, 1)}, PARTITION, 8)
    other = ObservationLoader({"a": numbered(0, 41, 1)}, PARTITION, 8)
    with pytest.raises(ValueError, match=r"a loader with sizes \{'a': 41\}, but here it is"):
        loader.load_state_dict(other.state_dict())
    smaller = ObservationLoader({"a": numbered(0, 40, 1)}, PARTITION, 4)
    with pytest.raises(ValueError, match="a loader with batch_size 4, but here it is 8"):
        loader.load_state_dict(smaller.state_dict())


@pytest.mark.parametrize(
    ("datasets", "error", "message"),
    [
        ({}, ValueError, "at least one data set"),
        ({"z": torch.zeros(3, 1)}, ValueError, "has no part 'z'"),
        ({"a": torch.zeros(0, 1)}, ValueError, "data set of 'a' is empty"),
        ({"a": iter(())}, TypeError, "expects __len__ and __getitem__"),
        (
            {"joint": torch.zeros(9, 4), ("c", "a", "b"): torch.zeros(9, 4)},
            ValueError,
            "'joint' and .* are the same",
        ),
    ],
)
def test_what_is_no_data_set_is_refused(datasets, error, message):
    with pytest.raises(error, match=message):
        ObservationLoader(datasets, PARTITION, 2)


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("workers", -1)])
def test_options_out_of_range_are_refused(option, value):
    options = {"batch_size": 2, option: value}
    with pytest.raises(ValueError, match=option):
        ObservationLoader({"a": torch.zeros(9, 1)}, PARTITION, **options)


def test_samples_of_a_wrong_shape_are_refused_where_they_are_loaded():
    loader = ObservationLoader({"a": torch.zeros(9, 2)}, PARTITION, 2)
    with pytest.raises(ValueError, match="expects 1 entries along dim 1"):
        next(iter(loader))
