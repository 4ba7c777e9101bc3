"""The masks of dropout: Philox's published answers, and the statistics of what is drawn."""

import itertools
import math

import pytest
import torch

from lenet_fast.dropout_masks import mask, philox

# kat_vectors of Random123 1.14: counter, key, answer
KNOWN = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(counter, key[0] | key[1] << 32).tolist() == list(answer)
    together = philox([torch.tensor([word, 7]) for word in counter], key[0] | key[1] << 32)
    assert together[0].tolist() == list(answer)
    assert together[1].tolist() == philox((7, 7, 7, 7), key[0] | key[1] << 32).tolist()


def assert_share(kept, p):
    """That share of independent draws is within five standard deviations."""
    number = kept.numel()
    assert abs(kept.double().sum().item() - number * (1 - p)) <= 5 * math.sqrt(number * p * (1 - p))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.8, 0.99])
def test_as_many_are_kept_as_the_probability_says(p, maps):
    drawn = mask(5, 0, 3, (300, 400), p, maps=maps, dtype=torch.float64)
    assert set(drawn.unique().tolist()) == {0, 1 / (1 - p)}
    assert_share(drawn != 0, p)
    assert abs(drawn.mean() - 1) <= 5 * math.sqrt(p / (1 - p) / drawn.numel())


@pytest.mark.parametrize("maps", [False, True])
def test_all_are_kept_or_dropped(maps):
    assert torch.equal(mask(5, 0, 3, (7, 5, 2), 0, maps=maps), torch.ones(7, 5, 2))
    assert torch.equal(mask(5, 0, 3, (7, 5, 2), 1, maps=maps), torch.zeros(7, 5, 2))


def test_a_map_is_dropped_as_a_whole():
    drawn = mask(5, 0, 1, (50, 6, 4, 3), 0.5, maps=True)
    assert torch.equal(drawn, drawn[:, :, :1, :1].expand_as(drawn))
    assert torch.equal(drawn[:, :, 0, 0], mask(5, 0, 1, (50, 6), 0.5, maps=True))


def test_masks_are_independent_of_each_other():
    """Of other seeds, steps, places and kinds, of neighbouring images and values: they agree as often as by chance."""
    p, shape = 0.3, (200, 250)
    agree = p * p + (1 - p) ** 2
    numbers = (0, 0, 0, False), (1, 0, 0, False), (1 << 40, 0, 0, False), (0, 1, 0, False), (0, 0, 1, False)
    numbers += ((0, 0, 0, True), (0, 0, 8, False), (1, 1, 1, True))
    drawn = [mask(seed, step, place, shape, p, maps=maps) != 0 for seed, step, place, maps in numbers]
    drawn += [drawn[0].roll(shift, dim) for dim, shift in itertools.product((0, 1), (1, 2, 3, 4, 5, 16))]
    for one, other in itertools.combinations(drawn, 2):
        assert_share(one != other, agree)


def test_a_mask_does_not_depend_on_the_rest_of_its_batch():
    whole = mask(3, 9, 2, (40, 6, 5, 5), 0.5)
    assert torch.equal(whole[:7], mask(3, 9, 2, (7, 6, 5, 5), 0.5))
    assert torch.equal(whole[:, :4], mask(3, 9, 2, (40, 4, 5, 5), 0.5))
    assert torch.equal(whole.flatten(1), mask(3, 9, 2, (40, 150), 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1 << 64}, "seed: expected an int from -9223372036854775808 to 18446744073709551615, got 1844"),
        ({"seed": -(1 << 63) - 1}, "seed: expected"),
        ({"seed": 1.0}, "seed: expected an int .*, got 1.0"),
        ({"seed": torch.tensor(1)}, "seed: expected an int .*, got tensor"),
        ({"step": 1 << 32}, "step: expected an int from 0 to 4294967295, got 4294967296"),
        ({"step": -1}, "step: expected"),
        ({"step": 0.5}, "step: expected"),
        ({"step": True}, "step: expected"),
        ({"place": -1}, "place: expected an int from 0 to 2147483647, got -1"),
        ({"place": 1 << 31}, "place: expected"),
        ({"place": 1.5}, "place: expected"),
        ({"shape": (5,)}, r"shape: expected \(N, C, ...\), got \(5,\)"),
        ({"shape": 5}, "shape: expected"),
        ({"shape": (5, -2)}, "shape: expected an int from 0 .*, got -2"),
        ({"shape": (5, 2.0)}, "shape: expected"),
        ({"p": 1.5}, "p: expected a probability from 0 to 1, got 1.5"),
        ({"p": -0.1}, "p: expected"),
        ({"p": math.nan}, "p: expected"),
        ({"p": "0.5"}, "p: expected"),
        ({"maps": 2}, "maps: expected True or False, got 2"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.float64, got torch.float16"),
        ({"dtype": torch.int64}, "dtype: expected"),
        ({"dtype": None}, "dtype: expected"),
    ],
)
def test_what_is_out_of_range_is_refused(changes, message):
    arguments = {"seed": 0, "step": 0, "place": 0, "shape": (5, 2), "p": 0.5}
    with pytest.raises(ValueError, match="^" + message):
        mask(**(arguments | changes))


def test_the_ends_of_the_ranges_are_taken():
    assert torch.equal(mask(-1, 3, 0, (5, 40), 0.5), mask((1 << 64) - 1, 3, 0, (5, 40), 0.5))
    assert torch.equal(mask(-(1 << 63), 3, 0, (5, 40), 0.5), mask(1 << 63, 3, 0, (5, 40), 0.5))
    assert mask(0, (1 << 32) - 1, (1 << 31) - 1, torch.Size((5, 40)), 0.5, maps=True).shape == (5, 40)
    for shape in ((0, 3), (3, 0), (3, 2, 0, 4)):
        assert mask(0, 0, 0, shape, 0.5).shape == mask(0, 0, 0, shape, 0.5, maps=True).shape == shape
