"""A dropped decoder as the fewest blocks: what lost both halves goes, and lone halves that meet are paired again."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["Block", "is_native", "normalise"]

Block = tuple[int | None, int | None]
"""Layers of the source from which a block has its attention and its MLP; None where it has none."""


def normalise(layers: int, dropped_attention: Collection[int], dropped_mlp: Collection[int]) -> tuple[Block, ...]:
    """Write what survives of A0 M0 A1 M1 ... in as few blocks of attention and MLP as there can be.

    Exact for decoders whose halves follow one another on the residual stream: an attention that has
    lost its MLP and the next MLP that has lost its attention are one block, norms included. Where
    both halves read the same stream, only blocks with i == j mean what the source means.

    Parameters
    ----------
    layers : int
        Decoder layers of the source.
    dropped_attention, dropped_mlp : collection of int
        Layers without attention, and without MLP; a dropped block is in both.

    Returns
    -------
    tuple of (attention source or None, MLP source or None)
        In their order; never (None, None).

    Raises
    ------
    ValueError
        An index is no layer.

    Examples
    --------
    >>> normalise(4, [2], [1])
    ((0, 0), (1, 2), (3, 3))
    """
    odd = [i for i in (*dropped_attention, *dropped_mlp) if not 0 <= i < layers]
    if odd:
        raise ValueError(f"layer {odd[0]} is dropped, and the model has layers 0 to {layers - 1}")
    blocks: list[Block] = []
    for layer in range(layers):
        if layer not in dropped_attention:
            blocks.append((layer, None))
        if layer not in dropped_mlp:
            if blocks and blocks[-1][1] is None:
                blocks[-1] = (blocks[-1][0], layer)
            else:
                blocks.append((None, layer))
    return tuple(blocks)


def is_native(blocks: Collection[Block]) -> bool:
    """Whether every block has both halves, so that a stock class of fewer layers is the model."""
    return bool(blocks) and all(None not in block for block in blocks)
