"""The pool of earlier fakes."""

import pytest
import torch

from factordisc import Partition
from support.pool import FakePool

TENSOR = Partition({"a": 1, "b": 1})


def make(size, partition=TENSOR, seed=0):
    return FakePool(size, partition, torch.Generator().manual_seed(seed))


def numbered(start, rows=4):
    """Rows that say in both parts when they were made."""
    return torch.arange(start, start + rows).float()[:, None].expand(-1, 2)


def test_the_first_fakes_fill_the_pool_and_are_shown_as_they_are():
    pool = make(10)
    for start in (0, 4):
        assert torch.equal(pool(numbered(start)), numbered(start))
    shown = pool(numbered(8))  # of which two fill it
    assert torch.equal(shown[:2], numbered(8, rows=2))
    assert pool.filled == 10


def test_afterwards_half_the_fakes_are_swapped_whole_and_none_is_lost():
    pool, steps = make(10), range(10, 4010, 4)
    pool(numbered(0, rows=10))
    given = [numbered(start) for start in steps]
    shown = [pool(fake) for fake in given]
    assert all(torch.equal(fake[:, 0], fake[:, 1]) for fake in shown)  # parts stay together
    # What fills the pool is shown at once, and later again when it is swapped out.
    after = torch.cat([*shown, pool.stored[0]])[:, 0]
    assert torch.equal(after.sort().values, torch.arange(4010.0))
    swapped = (torch.cat(shown) != torch.cat(given))[:, 0].double().mean()
    assert abs(swapped - 0.5) < 5 * (0.25 / 4000) ** 0.5


def test_places_are_drawn_evenly():
    pool = make(10)
    pool(numbered(0, rows=10))
    stays = torch.zeros(10)
    for start in range(10, 4010, 4):
        before = pool.stored[0].clone()
        pool(numbered(start))
        stays += (pool.stored[0] == before)[:, 0]
    # of 1,000 batches each swaps a place with probability 4/10 * 1/2
    assert ((stays - 800).abs() < 5 * (1000 * 0.8 * 0.2) ** 0.5).all()


def test_fakes_of_several_tensors_are_swapped_as_a_whole():
    pool = make(6, Partition.fields("a", "b"))
    for start in range(0, 80, 4):
        image = numbered(start)[:, :, None, None].expand(-1, -1, 3, 3)
        a, b = pool((image, numbered(start)))
        assert a.shape == (4, 2, 3, 3)
        assert torch.equal(a[:, :, 0, 0], b)


def test_a_pool_goes_on_exactly():
    pool, other = make(6), make(6, seed=1)
    for start in (0, 4, 8):
        pool(numbered(start))
    other.load_state_dict(pool.state_dict(), torch.device("cpu"))
    other.rng.set_state(pool.rng.get_state())
    for start in (12, 16):
        assert torch.equal(pool(numbered(start)), other(numbered(start)))
    assert torch.equal(pool.stored[0], other.stored[0])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a size of at least 1, but got 0"):
        make(0)
    with pytest.raises(ValueError, match=r"pool of 3 fakes expects .* but got 4"):
        make(3)(numbered(0))
