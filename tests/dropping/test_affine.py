"""Healing in closed form against least squares, and where it acts."""

import pytest
import torch

from honeloom.dropping.affine import ChannelFit, units_behind_gaps
from honeloom.dropping.plan import Room
from honeloom.dropping.scores import Unit


@pytest.mark.parametrize("shifted", [True, False])
def test_every_channel_is_the_least_squares_line(shifted):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, 3, generator=generator) + 1.0
    target = 0.5 * given + 2.0 + 0.1 * torch.randn(40, 3, generator=generator)
    fit = ChannelFit(3, shifted=shifted)
    fit.add(given[:25], target[:25])
    fit.add(given[25:], target[25:])
    scale, shift = fit.solve()
    for channel in range(3):
        columns = [given[:, channel], torch.ones(40)] if shifted else [given[:, channel]]
        wanted = torch.linalg.lstsq(torch.stack(columns, dim=1).double(), target[:, channel : channel + 1].double())
        found = torch.stack([scale[channel], shift[channel]] if shifted else [scale[channel]])
        torch.testing.assert_close(found, wanted.solution.squeeze(1))
    if not shifted:
        assert torch.equal(shift, torch.zeros(3, dtype=torch.float64))


def test_a_channel_that_never_contributes_keeps_its_scale():
    fit = ChannelFit(2, shifted=False)
    fit.add(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([[5.0, 3.0], [5.0, 6.0]]))
    scale, _ = fit.solve()
    assert scale.tolist() == [1.0, 3.0]


def test_the_half_behind_every_gap_is_scaled():
    room = Room(5, without_mlp=frozenset({0}))
    found = units_behind_gaps(room, frozenset({1, 2, 4}), frozenset({0, 1, 4}))
    assert found == [Unit("mlp", 2)]  # attention 1 to attention 2 are one gap; nothing lies behind that of layer 4
