"""The table of chips agrees with what its makers publish of whole pods."""

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.plan import targets
from t5x_lite.plan.chips import CHIPS, FLAGS, GIB, chip_of, num_links


@pytest.mark.parametrize(
    ("kind", "side", "pod_pflops", "all_reduce_tb_per_s", "bisection_tb_per_s"),
    [("v5e", 16, 50.63, 51.2, 1.6), ("v6e", 16, 234.9, 102.4, 3.2)],
)
def test_pods_of_two_dimensions(kind, side, pod_pflops, all_reduce_tb_per_s, bisection_tb_per_s):
    """Google's pages state these of a pod of 16x16 chips, a torus."""
    chip, num_chips = CHIPS[kind], side * side
    assert num_chips * chip.peak_flops.value / 1e15 == pytest.approx(pod_pflops, rel=0.005)
    sent = num_chips * chip.link_bandwidth.value * num_links((side, side))
    assert sent / 1e12 == pytest.approx(all_reduce_tb_per_s)
    # A cut through the middle goes through every row twice, once because it closes to a ring.
    assert 2 * side * chip.link_bandwidth.value / 1e12 == pytest.approx(bisection_tb_per_s)


def test_a_v4_pod_of_three_dimensions():
    """Google's page: 1.1 exaflops, an all-reduce bandwidth of 1.1 PB/s (in powers of two)."""
    chip = CHIPS["v4"]
    assert 4096 * chip.peak_flops.value / 1e18 == pytest.approx(1.1, rel=0.03)
    sent = 4096 * chip.link_bandwidth.value * num_links((16, 16, 16))
    assert sent / 2**50 == pytest.approx(1.1, rel=0.01)


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ((16, 16), 4),
        ((8, 16), 3),
        ((4, 4), 2),
        ((2, 4), 2),
        ((1, 1), 1),
        ((4, 4, 4), 6),
        ((8, 8, 16), 6),
        ((2, 2, 1), 2),
        ((2, 4, 4), 3),
        ((8,), 1),
    ],
)
def test_links_of_the_worst_placed_chip(topology, expected):
    assert num_links(topology) == expected


def test_every_target_has_its_chip_and_every_figure_its_source():
    assert set(CHIPS) == set(targets.KINDS)
    for kind, chip in CHIPS.items():
        assert chip.kind == kind
        assert 0.9 * chip.hbm_bytes.value < chip.usable_bytes < chip.hbm_bytes.value
        for name in FLAGS:
            figure = getattr(chip, name)
            assert figure is None or (figure.value > 0 and figure.source)
            assert figure is not None or name == "price"


def test_figures_are_replaced_in_the_units_of_their_flags():
    chip = chip_of("v5e", {"peak_flops": 100, "hbm_bytes": 8, "reserved_bytes": 0, "price": 0.5})
    assert chip.peak_flops == (100e12, "given")
    assert chip.usable_bytes == 8 * GIB
    assert chip.price == (0.5, "given")
    assert chip.hbm_bandwidth == CHIPS["v5e"].hbm_bandwidth


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"peak_flops": 0}, "--peak_tflops=0: must be above 0"),
        ({"price": -1}, "--price_per_chip_hour=-1: must be 0 or more"),
    ],
)
def test_figures_that_cannot_be(given, expected):
    with pytest.raises(UsageError, match=expected):
        chip_of("v5e", given)


def test_a_chip_that_nobody_knows():
    with pytest.raises(UsageError, match="no peaks are known of 'v5x'; did you mean 'v5"):
        chip_of("v5x")
