"""What was observed, and rows with independent parts: the law of what is drawn."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from factordisc import Density, DependencySampler, Factorisation, Observations, Partition, Ratio

# A right sampler fails a test at this level once in 10 000 runs, were the seeds not fixed; the
# faults that the tests are for give p-values far below it.
LEVEL = 1e-4
BATCHES = 3000


def fields(number):
    return Partition.fields(*"abcde"[:number])


def rows_of_indices(number, size, offset=0):
    """Parts whose value is the row they come from: what is drawn says where it was drawn."""
    return tuple(torch.arange(size) + offset for _ in range(number))


def term(numerator, denominator, name="term"):
    def side(text):
        return tuple(Density(density[0], tuple(density[1:])) for density in text.split())

    return Ratio(name, 1, side(numerator), side(denominator))


def p_value(codes, probabilities):
    observed = torch.bincount(codes, minlength=len(probabilities))
    return chisquare(observed.numpy(), np.array(probabilities) * len(codes)).pvalue


# --- the law of a drawn row ---


def independence(collisions, number, size):
    """The p-value of "a drawn row has the law of the product", one row from every batch.

    In the data all parts of an observation are equal, as dependent as parts can be.
    """
    rng = torch.Generator().manual_seed(1000 * number + size)
    sampler = DependencySampler(fields(number), rng, collisions)
    codes = []
    for batch in range(BATCHES):
        value = (torch.rand(size, generator=rng) < 0.4).long()
        drawn = torch.stack(sampler((value,) * number))[:, batch % size]
        codes.append(sum(int(v) << i for i, v in enumerate(drawn)))
    cells = itertools.product([0.6, 0.4], repeat=number)
    return p_value(torch.tensor(codes), [float(np.prod(cell)) for cell in cells])


SHAPES = [(k, n) for k in (2, 3, 4, 5) for n in (4, 8, 25, 64) if k <= n]


@pytest.mark.parametrize(("number", "size"), SHAPES)
def test_a_drawn_row_has_the_law_of_the_product(number, size):
    assert independence("forbid", number, size) > LEVEL


def test_permutations_that_may_collide_do_not_have_that_law():
    assert independence("allow", 2, 4) < 1e-12


@pytest.mark.parametrize("number", [2, 3, 4])
def test_every_combination_of_different_observations_is_as_likely(number):
    sampler = DependencySampler(fields(number), torch.Generator().manual_seed(0))
    combinations = list(itertools.permutations(range(4), number))
    x = rows_of_indices(number, 4)
    rows = [torch.stack(sampler(x))[:, i % 4].tolist() for i in range(BATCHES)]
    codes = torch.tensor([combinations.index(tuple(row)) for row in rows])
    assert p_value(codes, [1 / len(combinations)] * len(combinations)) > LEVEL


@pytest.mark.parametrize(("number", "size"), [*SHAPES, (5, 5), (2, 2)])
def test_parts_keep_their_values_and_rows_mix_observations(number, size):
    drawn = torch.stack(DependencySampler(fields(number))(rows_of_indices(number, size)))
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(size).expand(number, size))
    for one, other in itertools.combinations(drawn, 2):
        assert (one != other).all()


def test_collisions_are_permutations_of_every_part():
    sampler = DependencySampler(fields(3), torch.Generator().manual_seed(0), collisions="allow")
    drawn = torch.stack([torch.stack(sampler(rows_of_indices(3, 4))) for _ in range(100)])
    assert torch.equal(drawn.sort(dim=2).values, torch.arange(4).expand(100, 3, 4))
    for one, other in itertools.combinations(range(3), 2):
        # A pair meets in 100 of 400 rows on average, with variance 100 x 4/3 x 3/4 ~ 100.
        assert abs(int((drawn[:, one] == drawn[:, other]).sum()) - 100) < 5 * 10
    one_row = torch.stack(sampler(rows_of_indices(3, 1)))
    assert torch.equal(one_row, torch.zeros(3, 1, dtype=torch.int64))


# --- the rows of the two sides of a term ---

ABC = fields(3)
P_DEPENDENCY = term("pabc", "pa pb pc")


def test_a_p_dependency_is_made_of_its_own_rows_whatever_else_was_seen():
    pairs = rows_of_indices(3, 8)
    others = {name: torch.arange(50) + 100 for name in "abc"}
    real = Observations({("a", "b"): rows_of_indices(2, 30, 200)}, **others, joint=pairs)
    numerator, denominator = DependencySampler(ABC).draw(P_DEPENDENCY, {"p": real, "q": pairs})
    assert all(torch.equal(one, other) for one, other in zip(numerator, pairs, strict=True))
    drawn = torch.stack(denominator)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(8).expand(3, 8))
    assert all((one != other).all() for one, other in itertools.combinations(drawn, 2))


def test_blocks_stay_together():
    real = Observations(joint=rows_of_indices(3, 8))
    _, drawn = DependencySampler(ABC).draw(term("pabc", "pac pb"), {"p": real})
    assert torch.equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).all()


def test_a_marginal_takes_its_own_batch_or_else_a_crop():
    marginal, fake = term("pa", "qa"), rows_of_indices(3, 6, 500)
    pairs, lone = rows_of_indices(3, 8), torch.arange(20) + 100
    sampler = DependencySampler(ABC)
    numerator, denominator = sampler.draw(marginal, {"p": Observations(joint=pairs), "q": fake})
    assert numerator is pairs[0]
    assert denominator is fake[0]
    real = Observations(joint=pairs, a=lone)
    assert sampler.draw(marginal, {"p": real, "q": fake})[0] is lone
    assert sampler.draw(marginal, {"p": pairs, "q": Observations(a=lone)})[1] is lone


@pytest.mark.parametrize(
    ("patterns", "wanted", "taken"),
    [
        (["joint", "ab", "b"], "a", "ab"),
        (["ab", "ac"], "a", "ab"),
        (["ac", "ab"], "a", "ac"),
        (["joint", "bc"], "ab", "joint"),
        (["joint", "ab", "a"], "ab", "ab"),
        (["abcd", "joint", "acd"], "ad", "acd"),
    ],
)
def test_the_smallest_batch_that_holds_the_parts_is_taken(patterns, wanted, taken):
    batches = {}
    for i, pattern in enumerate(patterns):
        names = tuple(pattern) if pattern != "joint" else "joint"
        number = 5 if pattern == "joint" else len(pattern)
        batch = rows_of_indices(number, 4, 100 * i)
        batches[names] = batch if number > 1 else batch[0]
    sampler = DependencySampler(fields(5))
    fake = rows_of_indices(5, 4)
    numerator, _ = sampler.draw(
        term("p" + wanted, "q" + wanted), {"p": Observations(batches), "q": fake}
    )
    first = numerator if len(wanted) == 1 else numerator[0]
    assert first[0] == 100 * patterns.index(taken)


def test_a_side_from_several_batches_has_the_rows_of_the_smallest():
    real = Observations(a=torch.arange(9), b=torch.arange(5) + 100, c=torch.arange(7) + 200)
    _, drawn = DependencySampler(ABC).draw(
        term("qabc", "pa pb pc"), {"p": real, "q": rows_of_indices(3, 6)}
    )
    assert [len(part) for part in drawn] == [5, 5, 5]
    for i, part in enumerate(drawn):
        assert ((part >= 100 * i) & (part < 100 * i + 9)).all()
        assert len(part.unique()) == 5


@pytest.mark.parametrize("rows", [1, 4])
def test_blocks_of_one_batch_on_such_a_side_never_share_a_row(rows):
    real = Observations({("a", "b"): rows_of_indices(2, 9), "c": torch.arange(rows)})
    sampler = DependencySampler(ABC, torch.Generator().manual_seed(0))
    sources = {"p": real, "q": rows_of_indices(3, 4)}
    for _ in range(50):
        _, (a, b, c) = sampler.draw(term("qabc", "pa pb pc"), sources)
        assert [len(part) for part in (a, b, c)] == [rows] * 3
        assert (a != b).all()


def test_a_side_from_a_mapping_and_a_tensor_is_what_its_network_receives():
    pair = {"b": torch.arange(6) + 100, "a": torch.arange(6)}
    real = Observations({("a", "b"): pair, "c": torch.arange(5) + 200})
    sources = {"p": real, "q": rows_of_indices(3, 6)}
    _, drawn = DependencySampler(ABC).draw(term("qabc", "pab pc"), sources)
    assert isinstance(drawn, tuple)
    assert [int(part.min()) // 100 for part in drawn] == [0, 1, 2]
    assert torch.equal(drawn[0] + 100, drawn[1])


def test_both_sources_can_meet_in_one_side():
    sources = {"p": rows_of_indices(3, 8), "q": rows_of_indices(3, 6, 100)}
    above, below = DependencySampler(ABC).draw(term("pab qc", "pc qa qb"), sources)
    assert [len(part) for part in (*above, *below)] == [6] * 6
    assert torch.equal(above[0], above[1])
    assert [bool((part >= 100).all()) for part in above] == [False, False, True]
    assert [bool((part >= 100).all()) for part in below] == [True, True, False]
    assert (below[0] != below[1]).all()


def test_rows_of_a_product_of_marginals_have_its_law():
    # Without complete observations: a, b from the pairs, c from its own batch.
    rng = torch.Generator().manual_seed(0)
    sampler, side = DependencySampler(ABC, rng), term("qabc", "pa pb pc")
    codes, fake = [], rows_of_indices(3, 4)
    for batch in range(BATCHES):
        pair, lone = (torch.rand(2, 4, generator=rng) < 0.4).long()
        real = Observations({("a", "b"): (pair, pair), "c": lone})
        a, b, c = (part[batch % 4] for part in sampler.draw(side, {"p": real, "q": fake})[1])
        codes.append(int(a + 2 * b + 4 * c))
    cells = itertools.product([0.6, 0.4], repeat=3)
    assert p_value(torch.tensor(codes), [float(np.prod(cell)) for cell in cells]) > LEVEL


# --- randomness and form ---


def test_the_same_state_gives_the_same_rows_and_the_global_one_is_left_alone():
    x = torch.arange(60.0).reshape(20, 3)
    partition = Partition.steps(3)
    flat = Factorisation.flat(partition.names)
    state = torch.get_rng_state()
    runs = []
    for seed in (7, 7, 8):
        sampler = DependencySampler(partition, torch.Generator().manual_seed(seed))
        sides = [sampler.draw(t, {"p": x, "q": x + 100}) for t in flat.terms]
        runs.append(torch.cat([sampler(x), *(side[1] for side in sides[-2:])]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_one_decides():
    x, sampler = rows_of_indices(2, 50), DependencySampler(fields(2))
    first = [sampler(x) for _ in range(2) if torch.manual_seed(3)]
    assert torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[1][0], sampler(x)[0])


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("kind", ["slices", "indices", "tuple", "mapping"])
def test_rows_come_in_the_form_and_the_type_of_the_data(kind, numpy):
    parts = {"a": torch.randn(6, 2), "b": torch.randn(6, 1), "c": torch.randn(6, 2)}
    if kind in ("tuple", "mapping"):
        partition = Partition.fields("a", "b", "c")
        parts |= {"b": torch.arange(6, dtype=torch.uint8), "c": torch.randn(6, 2, 2).half()}
    elif kind == "slices":
        partition = Partition({"a": 2, "b": 1, "c": 2})
    else:
        partition = Partition.indices({"a": [4, 0], "b": [1], "c": [3, 2]})
    tensors = dict(parts)
    if numpy:
        parts = {name: part.numpy() for name, part in parts.items()}
    x = parts if kind == "mapping" else partition.join(parts)
    before = copy.deepcopy(x)
    sampler = DependencySampler(partition)
    whole = term("pabc", "pa pb pc")
    sides = sampler.draw(whole, {"p": x})
    crop = sampler.draw(term("pac", "pa pc"), {"p": Observations(joint=x)})
    assert describe(sampler(x)) == describe(x)
    # what a network receives: tensors, one or a tuple
    received = partition.take(tensors, partition.names)
    assert describe(sides[0]) == describe(sides[1]) == describe(received)
    assert describe(crop[0]) == describe(crop[1]) == describe(partition.take(tensors, ["a", "c"]))
    assert describe(x) == describe(before)
    for name, part in partition.split(x).items():
        part = np.asarray(part)
        assert (part == np.asarray(partition.split(before)[name])).all()
        drawn = partition.split(sides[1])[name].numpy()
        order = [next(i for i in range(6) if (part[i] == row).all()) for row in drawn]
        assert sorted(order) == list(range(6))


def describe(x):
    if isinstance(x, dict):
        return {name: describe(array) for name, array in x.items()}
    if isinstance(x, tuple):
        return tuple(describe(array) for array in x)
    return type(x), x.dtype, tuple(x.shape)


def test_gradients_reach_the_data_through_drawn_rows():
    x = torch.randn(6, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(DependencySampler(Partition.steps(3))(x).sum(), x)
    assert torch.equal(gradient, torch.ones(6, 3))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "DependencySampler expects a Partition, but got 3", {"partition": 3}),
        (TypeError, "`rng` expects a torch.Generator or None, but got 3", {"rng": 3}),
        (ValueError, "`collisions` is 'forbid' or 'allow', but got 'x'", {"collisions": "x"}),
    ],
)
def test_what_makes_no_sampler_is_refused(error, match, arguments):
    with pytest.raises(error, match=match):
        DependencySampler(**{"partition": ABC} | arguments)


def test_the_sampler_refuses_too_few_rows():
    match = (
        r"The sampler combines 3 parts of different observations, but the batch of "
        r"\('a', 'b', 'c'\) has 2 rows\. .* at least 3, .*Factorisation\.hierarchical"
    )
    with pytest.raises(ValueError, match=match):
        DependencySampler(ABC)(rows_of_indices(3, 2))


# --- a step ---


def test_a_step_with_too_little_data_for_a_term_has_no_rows_of_it():
    pairs = Observations({("a", "b"): rows_of_indices(2, 4)})
    few = Observations(joint=rows_of_indices(3, 2))
    sampler, q = DependencySampler(ABC), rows_of_indices(3, 4)
    for real, wanted in (
        (pairs, P_DEPENDENCY),  # no batch holds the parts
        (pairs, term("qabc", "pa pb pc")),  # nor one of them
        (few, P_DEPENDENCY),  # 2 rows, 3 blocks
        (Observations(), term("pa", "qa")),
    ):
        assert sampler.draw(wanted, {"p": real, "q": q}) is None
    numerator, denominator = sampler.draw(term("pab", "pa pb"), {"p": few})
    assert [len(part) for part in (*numerator, *denominator)] == [2] * 4
    assert sampler.draw(term("pa", "qa"), {"p": few, "q": q}) is not None


@pytest.mark.parametrize(
    ("match", "wanted", "sources"),
    [
        (r"'term' is about part 'd', but the parts are \('a', 'b', 'c'\)", term("pd", "qd"), "p"),
        (r"'term' needs source 'q', but got \('p',\)", term("pa", "qa"), "p"),
    ],
)
def test_terms_of_other_parts_or_sources_are_refused(match, wanted, sources):
    with pytest.raises(ValueError, match=match):
        DependencySampler(ABC).draw(wanted, dict.fromkeys(sources, rows_of_indices(3, 4)))


def test_the_terms_of_a_step_share_one_order_of_each_batch():
    step = DependencySampler(ABC).step({"p": rows_of_indices(3, 8)})
    one, other = (step.draw(term("pabc", "pa pb pc"))[1] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    pair = step.draw(term("pac", "pa pc"))[1]
    assert torch.equal(pair[0], one[0])  # the first block in the first order
    assert torch.equal(pair[1], one[1])  # the second in the second, whatever its parts


def test_equal_seeds_give_equal_rows_whatever_was_planned_before():
    x, y = rows_of_indices(3, 8), rows_of_indices(3, 5)
    fresh, used = (DependencySampler(ABC, torch.Generator().manual_seed(1)) for _ in range(2))
    used.step({"p": Observations(a=x[0])}).draw(P_DEPENDENCY)
    for real in (x, y):
        one, other = (s.draw(P_DEPENDENCY, {"p": real})[1] for s in (fresh, used))
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_plan_is_of_a_term_not_of_its_name():
    sampler, x = DependencySampler(ABC), rows_of_indices(3, 8)
    assert len(sampler.draw(term("pabc", "pa pb pc"), {"p": x})[0]) == 3
    assert len(sampler.draw(term("pab", "pa pb"), {"p": x})[0]) == 2


@pytest.mark.parametrize("kind", ["slices", "fields"])
def test_a_part_has_one_type_in_all_batches_of_a_step(kind):
    if kind == "slices":
        partition = Partition({"a": 2, "b": 3})
        real, fake = Observations(b=np.zeros((8, 3))), torch.zeros(4, 5)
        says = r"torch.float64 in the batch of 'b' in source 'p' and torch.float32 in source 'q'"
    else:
        partition = Partition.fields("a", "b")
        real = Observations(b=torch.zeros(8, dtype=torch.float64))
        fake = (torch.zeros(4, dtype=torch.int64), torch.zeros(4))
        says = r"Part 'b' has one dtype .* torch.float64 in the batch of 'b' in source 'p' and "
        says += (
            r"torch.float32 in source 'q'\. Convert one of them, such as by `\.to\(torch\.float64"
        )
    with pytest.raises(ValueError, match=says):
        DependencySampler(partition).step({"p": real, "q": fake})
    on_meta = torch.zeros(8, 3, device="meta"), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"is meta in the batch of 'b' in source 'p' and cpu in"):
        DependencySampler(Partition({"a": 2, "b": 3})).step(
            {"p": Observations(b=on_meta[0]), "q": on_meta[1]}
        )


def test_planning_is_done_once_for_a_set_of_patterns():
    partition = Partition.steps(4)
    sampler = DependencySampler(partition)
    flat = Factorisation.flat(partition.names)
    x = torch.randn(8, 4)

    def draw_all():
        step = sampler.step({"p": Observations({"joint": x, "1": x[:, :1]}), "q": x})
        return [step.draw(t) for t in flat.terms]

    draw_all()
    layout = type(partition._layout)
    forbidden = dict.fromkeys(["taker", "combiner", "restrict", "ordered"], None)
    with pytest.MonkeyPatch.context() as patch:
        for name in forbidden:
            patch.setattr(layout, name, lambda *_: pytest.fail("planned again"))
        draw_all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_sampler_that_was_used_can_be_copied_and_sent(copied):
    for partition, x in (
        (Partition.steps(3), torch.randn(6, 3)),
        (Partition.indices({"a": [2, 0], "b": [1]}), torch.randn(6, 3)),
        (ABC, rows_of_indices(3, 6)),
    ):
        sampler = DependencySampler(partition)
        terms = Factorisation.flat(partition.names).terms
        for t in terms:
            sampler.draw(t, {"p": x, "q": x})
        other = copied(sampler)
        for t in terms:
            torch.manual_seed(0)
            ours = sampler.draw(t, {"p": x, "q": x})
            torch.manual_seed(0)
            theirs = other.draw(t, {"p": x, "q": x})
            assert describe(ours) == describe(theirs)


# --- observations ---


def test_patterns_without_rows_count_as_not_observed():
    real = Observations(joint=rows_of_indices(3, 4), a=torch.zeros(0, dtype=torch.int64), b=None)
    numerator, _ = DependencySampler(ABC).draw(
        term("pa", "qa"), {"p": real, "q": rows_of_indices(3, 4)}
    )
    assert torch.equal(numerator, torch.arange(4))


@pytest.mark.parametrize("key", ["joint", ("a", "b", "c"), ("c", "a", "b")])
def test_all_parts_have_several_names(key):
    x = rows_of_indices(3, 4)
    numerator, _ = DependencySampler(ABC).draw(P_DEPENDENCY, {"p": Observations({key: x})})
    assert all(torch.equal(one, other) for one, other in zip(numerator, x, strict=True))


@pytest.mark.parametrize(
    ("error", "match", "batches"),
    [
        (ValueError, r"has no part 'z'\. Its parts are \('a', 'b', 'c'\)", {"z": torch.zeros(4)}),
        (
            ValueError,
            r"All parts were given twice: as 'joint' and as \('a', 'b', 'c'\)",
            {"joint": rows_of_indices(3, 4), ("a", "b", "c"): rows_of_indices(3, 4)},
        ),
        (
            ValueError,
            r"In the batch observed of \('a', 'b'\): .* expects 2 fields, but got 3",
            {("a", "b"): rows_of_indices(3, 4)},
        ),
        (
            ValueError,
            r"In the batch observed of 'joint': The fields of one batch have one length",
            {"joint": (*rows_of_indices(2, 4), torch.zeros(5))},
        ),
        (TypeError, "In the batch observed of 'a': .* but got int", {"a": 3}),
    ],
)
def test_batches_that_do_not_fit_their_pattern_are_refused(error, match, batches):
    with pytest.raises(error, match=match):
        DependencySampler(ABC).draw(term("pa", "pa"), {"p": Observations(batches)})


def test_pictures_stay_channels_last_and_rows_may_carry_gradients():
    partition = Partition({"a": 1, "b": 3})
    x = torch.randn(8, 4, 5, 5).to(memory_format=torch.channels_last)
    assert DependencySampler(partition)(x).is_contiguous(memory_format=torch.channels_last)
    rows = DependencySampler(partition)(x.requires_grad_())
    rows.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
