"""Running average of the models, best first."""

from __future__ import annotations

import numpy as np

from honeloom.merging.search.candidates import Candidate
from honeloom.merging.search.racing import Found, Race, SearchData

__all__ = ["average"]


def average(data: SearchData, *, confidence: float = 0.95, margin: float = 0.0, racing: bool = True) -> Found:
    """From the best single model on, take each next one into the average if that is better.

    With k models in the merge so far, a candidate is k/(k+1) times that merge plus 1/(k+1) times the next model, in
    the order of the single models' values. A rejected model leaves the merge as it was.

    Parameters
    ----------
    data : SearchData
        N models; at most N - 1 candidates are measured.
    confidence, margin : float
        Of the paired test by which a candidate is taken.
    racing : bool
        Stop candidates that are worse after some of the rows.

    Returns
    -------
    Found
        Equal weights of the chosen models.

    References
    ----------
    Zhao et al. 2024 (Model-GLUE), arXiv:2410.05357.
    """
    race = Race(data, confidence=confidence, margin=margin, racing=racing)
    first, *others = race.by_value
    members = np.eye(len(data.models))[first]
    for newcomer in others:
        if race.left < 1:
            return race.found("budget")
        wanted = members.copy()
        wanted[newcomer] = 1.0
        _, accepted = race.challenge(Candidate.of(wanted / wanted.sum(), rows=data.port.groups))
        if accepted:
            members = wanted
    return race.found("all models were tried")
