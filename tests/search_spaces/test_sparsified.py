"""The residual network: written down without torch, and sparsified as a module."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from nas.costs import COSTS
from search_spaces.sparsified import resnet, sparsified

ANALYTIC = [make() for name, make in COSTS.items() if name != "latency_ms"]
SIZES = [((1, 8, 8), 8, 4), ((3, 15, 13), 14, 6)]


@pytest.mark.parametrize(("shape", "depth", "width"), SIZES)
def test_what_is_written_down_has_the_choices_and_costs_of_the_module(
    shape: tuple[int, ...], depth: int, width: int
) -> None:
    written, space = (make(shape, 10, depth, width) for make in (resnet, sparsified))
    assert {c.name for c in written.choices} == {c.name for c in space.choices}
    assert written.size() == space.size()
    rng = np.random.default_rng(0)
    for picks in (space.smallest(), space.largest(), space.sample(rng)):
        for cost in ANALYTIC:
            assert cost.value(written, picks) == cost.value(space, picks), cost.name


def test_the_weights_have_the_names_of_the_published_networks() -> None:
    names = set(sparsified((3, 8, 8), 10, depth=20).build({}).state_dict())
    module = resnet((3, 8, 8), 10, depth=20).build({}, masked=False).state_dict()
    assert {"conv1.weight", "bn1.running_var", "layer3.2.conv2.weight", "linear.bias"} <= set(
        module
    )
    assert any(name.startswith("layer3.2.conv2.") for name in names)


def test_trained_weights_are_where_trials_start() -> None:
    trained = resnet((1, 8, 8), 10).build({}, masked=False).state_dict()
    space = sparsified((1, 8, 8), 10, weights=trained)
    built = space.build(space.largest(), masked=False).state_dict()
    assert all(torch.equal(built[name], value) for name, value in trained.items())


def test_the_shortcut_takes_every_second_position_and_pads_channels() -> None:
    space = resnet((2, 5, 5), 10, width=2)
    shortcut = space.build({}, masked=False).get_submodule("layer2.0.shortcut")
    x = torch.randn(1, 2, 5, 5)
    y = shortcut(x)
    assert y.shape == (1, 4, 3, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


@pytest.mark.parametrize("depth", [2, 10])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        resnet((1, 8, 8), 10, depth=depth)


def test_writing_it_down_needs_no_torch() -> None:
    code = (
        "import sys; from search_spaces.sparsified import resnet; "
        "resnet((1, 8, 8), 10).smallest(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("shape", "depth"), [((3, 8, 8), 8), ((1, 8, 8), 14)])
def test_weights_of_another_network_are_refused_by_name(
    shape: tuple[int, ...], depth: int
) -> None:
    described = resnet((1, 8, 8), 10, 8, 4)
    weights = described.build(described.largest(), masked=False).state_dict()
    with pytest.raises(ValueError, match=r"sparsified: weight \S+ is .*, the network's is"):
        sparsified(shape, 10, depth, 4, weights=weights)
