"""Scores by hand."""

from honeloom.dropping.scores import Score, UnitScores


def scores_of(attention=(), mlp=(), block=(), **windows):
    """Scores from plain numbers; None is a unit that is not there."""

    def of(values):
        return tuple(None if v is None else Score(v, None) for v in values)

    return UnitScores(of(attention), of(mlp), of(block), {int(n[1:]): of(v) for n, v in windows.items()})
