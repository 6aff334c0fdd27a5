"""The domain probe: a small network that tells a row's domain from its features, and how sure it is.

A row is only ever scored by a probe that did not learn from it. Rows are worked through in the
order of their ids on one thread, so that neither their order nor the machine's cores show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from honeloom.ops.noise import keyed_uniform, normal, permutation
from honeloom.types.ports import Vectors

__all__ = ["CrossFit", "calibration_error", "cross_fit", "entropy", "fit_temperature", "softmax"]

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

WIDTHS = (2.0, 1.0, 0.5)
"""Of the hidden layers, in lengths of a feature vector: the paper's trunk."""
WIDEST = 256
"""The paper's last hidden layer, and the most of any of ours: a few thousand rows do not determine the 76 million
weights that the trunk has at length 4,096, and a machine without a GPU trains this one in seconds."""
NARROWEST = 32
FEWEST_TAUGHT = 2
LEARN_ROWS = 5000
"""Rows a probe learns from at most, as in the paper."""
HELD_OUT, FEWEST_HELD_OUT = 0.1, 100
BATCH, EPOCHS, PATIENCE, RATE = 32, 60, 1, 1e-3
MEMBERS = 5
"""Probes from different starts whose probabilities are averaged: entropy between domains hangs on the start."""
BINS = 15
SMALLEST_BETA, LARGEST_BETA = 0.02, 50.0
"""Inverse temperatures that are tried."""
SCORED = 8192
"""Rows scored at a time."""


@dataclass(frozen=True, slots=True)
class CrossFit:
    """What probes say of N rows that they did not learn from.

    Attributes
    ----------
    probabilities : array (N, K), float64
        Calibrated; a row without features has NaN.
    entropies : array (N,), float64
        Of the probabilities, in nats.
    predicted : array (N,) or None
        Entropy in nats as the regression head predicts it.
    temperature : tuple of float
        By probe; above 1 where the probe was too sure.
    accuracy : float
        Share of the rows whose likeliest domain is their label; each by a probe that did not learn from it.
    calibration_error : float
        Mean gap between confidence and accuracy over 15 bins of confidence, in [0, 1].
    loss : float
        Mean of minus the log of the label's probability, in nats, over the same rows.
    epochs : tuple of int
        Passes until the held-out loss was lowest, by probe.
    """

    probabilities: Values
    entropies: Values
    predicted: Values | None
    temperature: tuple[float, ...]
    accuracy: float
    calibration_error: float
    loss: float
    epochs: tuple[int, ...]


def entropy(probabilities: Values) -> Values:
    """Entropy in nats over the last axis, with 0 ln 0 = 0; at least 0."""
    p = np.asarray(probabilities, dtype=np.float64)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    found: Values = np.maximum(-(p * logs).sum(axis=-1), 0.0)
    return found


def softmax(logits: Values) -> Values:
    """Probabilities over the last axis, in float64."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: Values = shifted / shifted.sum(axis=-1, keepdims=True)
    return found


def fit_temperature(logits: Values, labels: Labels) -> float:
    """The temperature T > 0 at which softmax(logits / T) has the lowest mean loss on (n, K) held-out rows.

    The loss is convex in 1 / T, so that a search over one number finds the minimum; T lies in
    [0.02, 50]. One row more, of which every domain has an equal part, is counted in, with the
    other rows' logits: where all of them are right, T would go to 0 without it. No rows give 1.

    References
    ----------
    Guo et al. 2017, arXiv:1706.04599; the row more is Platt's correction (1999).
    """
    if not len(labels):
        return 1.0

    share = 1.0 / (len(labels) + 1)

    def loss(beta: float) -> float:
        scaled = beta * logits
        top = scaled.max(axis=1)
        logs = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        right = scaled[np.arange(len(labels)), labels]
        return float((logs - (1 - share) * right - share * scaled.mean(axis=1)).mean())

    found = minimize_scalar(loss, bounds=(SMALLEST_BETA, LARGEST_BETA), method="bounded", options={"xatol": 1e-6})
    return 1.0 / float(found.x)


def calibration_error(probabilities: Values, labels: Labels) -> float:
    """Expected calibration error of (n, K) probabilities over 15 equal bins of confidence, in [0, 1]."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(place, confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, len(labels)))


def cross_fit(
    features: Vectors, labels: Labels, count: int, *, ids: Sequence[str], seed: int, folds: int = 2,
    regress: bool = False, teach: npt.NDArray[np.bool_] | None = None,
) -> CrossFit:  # fmt: skip
    """Train a probe per fold on the other folds' rows and let it score the fold; or one on the rows meant for it.

    Parameters
    ----------
    features : array (N, d)
        Of length 1; a memory map is read in pieces.
    labels : array (N,)
        Domain of every row, 0 to count - 1; -1 for a row that neither teaches nor is scored.
    count : int
        Domains, K.
    ids : sequence of str
        Of the rows: folds, starts and batches follow from them and the seed.
    folds : int
        At least 2; every domain is spread evenly over them.
    regress : bool
        Whether a second network learns the first one's entropies, as the paper's reward.
    teach : array (N,) of bool, optional
        Rows that one probe learns from; it scores the others, and `folds` has no part in it. The
        rows that taught get NaN.

    Returns
    -------
    CrossFit

    Raises
    ------
    ValueError
        Fewer than two domains, or fewer rows to learn from than folds need, or none to score.

    Notes
    -----
    A tenth of the rows a probe may learn from is held out: it ends the training (an epoch
    without a lower loss) and sets the temperature. Five probes from different starts are
    averaged.

    References
    ----------
    Ling et al. 2025, arXiv:2502.04380; the temperature and the folds are ours.
    """
    order = np.array(sorted(np.flatnonzero(labels >= 0).tolist(), key=ids.__getitem__), dtype=np.int64)
    if count < 2 or len(order) < 2 * folds:
        raise ValueError(f"a probe needs 2 domains and 2 rows per fold, got {count} domains and {len(order)} rows")
    parts = _parts(order, labels, ids, folds, seed) if teach is None else [(order[teach[order]], order[~teach[order]])]
    if any(len(learn) < FEWEST_TAUGHT or not len(score) for learn, score in parts):
        raise ValueError(f"a probe needs {FEWEST_TAUGHT} rows to learn from and one to score")
    probabilities = np.full((len(labels), count), np.nan)
    predicted = np.full(len(labels), np.nan) if regress else None
    temperatures, epochs = [], []
    with _one_thread():
        for f, (learn, score) in enumerate(parts):
            chosen = _chosen(learn, ids, seed)
            probes = [_Probe(features, labels, count, chosen, seed, f"probe/{f}/{m}") for m in range(MEMBERS)]
            probabilities[score] = np.mean([p.probabilities(features, score) for p in probes], axis=0)
            if predicted is not None:
                predicted[score] = np.mean([p.regress(features, score, seed) for p in probes], axis=0)
            temperatures += [p.temperature for p in probes]
            epochs += [p.epochs for p in probes]
    judged = order[np.isin(order, np.concatenate([score for _, score in parts]))]  # by id, so that sums are the same
    scored, truth = probabilities[judged], labels[judged]
    entropies = np.full(len(labels), np.nan)
    entropies[judged] = entropy(scored)
    return CrossFit(
        probabilities, entropies, predicted, tuple(temperatures), float((scored.argmax(axis=1) == truth).mean()),
        calibration_error(scored, truth), _mean_loss(scored, truth), tuple(epochs),
    )  # fmt: skip


def _parts(order: Labels, labels: Labels, ids: Sequence[str], folds: int, seed: int) -> list[tuple[Labels, Labels]]:
    """Per fold the rows to learn from, and those to score."""
    fold = _folds(labels[order], [ids[i] for i in order], folds, seed)
    return [(order[fold != f], order[fold == f]) for f in range(folds)]


def _mean_loss(probabilities: Values, labels: Labels) -> float:
    right = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(right, np.finfo(np.float64).tiny)).mean())


def _folds(labels: Labels, ids: Sequence[str], folds: int, seed: int) -> Labels:
    """Fold of every row: the rows of a domain, in the order of a draw by id, go round the folds."""
    draws = keyed_uniform(seed, "probe/fold", ids)
    order = np.lexsort((draws, labels))
    found = np.empty(len(labels), dtype=np.int64)
    found[order] = np.arange(len(labels)) % folds
    return found


def _chosen(teach: Labels, ids: Sequence[str], seed: int) -> Labels:
    """At most 5,000 of the rows, drawn by id; the order that comes back is that of the draw."""
    draws = keyed_uniform(seed, "probe/learn", [ids[i] for i in teach])
    return teach[np.argsort(draws, kind="stable")[:LEARN_ROWS]]


class _Probe:
    """A trained and calibrated classifier of features."""

    def __init__(self, features: Vectors, labels: Labels, count: int, rows: Labels, seed: int, name: str) -> None:
        self._held = max(1, int(HELD_OUT * len(rows)), min(FEWEST_HELD_OUT, len(rows) // 4))
        self._inputs = _read(features, rows)
        self._name = name
        truth = torch.from_numpy(labels[rows])
        self._network = _network(self._inputs.shape[1], count, seed, name)
        loss = nn.functional.cross_entropy
        self.epochs = _train(self._network, self._inputs, truth, self._held, loss, seed, name)
        held = _apply(self._network, self._inputs[: self._held])
        self.temperature = fit_temperature(held, labels[rows[: self._held]])

    def probabilities(self, features: Vectors, rows: Labels) -> Values:
        """Of rows, (n, K)."""
        parts = [_apply(self._network, _read(features, part)) for part in _pieces(rows)]
        return softmax(np.concatenate(parts) / self.temperature)

    def regress(self, features: Vectors, rows: Labels, seed: int) -> Values:
        """Entropy (n,) as a second network predicts it, taught by this one on the rows this one learnt from."""
        taught = entropy(softmax(_apply(self._network, self._inputs) / self.temperature))
        target = torch.from_numpy(taught.astype(np.float32))[:, None]
        name = f"{self._name}/reward"
        network = _network(self._inputs.shape[1], 1, seed, name)
        _train(network, self._inputs, target, self._held, nn.functional.mse_loss, seed, name)
        parts = [_apply(network, _read(features, part))[:, 0] for part in _pieces(rows)]
        return np.concatenate(parts)


def _pieces(rows: Labels) -> Iterator[Labels]:
    return (rows[start : start + SCORED] for start in range(0, len(rows), SCORED))


def _read(features: Vectors, rows: Labels) -> torch.Tensor:
    """Features (n, d) on a scale of about 1 per number, whatever their length."""
    ascending = np.argsort(rows, kind="stable")  # a memory map is read from its beginning to its end
    found = np.empty((len(rows), features.shape[1]), dtype=np.float32)
    found[ascending] = features[rows[ascending]]
    return torch.from_numpy(found * np.float32(math.sqrt(found.shape[1])))


def _network(length: int, outputs: int, seed: int, name: str) -> nn.Sequential:
    """ReLU layers with He's start; the last layer starts small, so that the first loss is near that of a guess."""
    widths = [max(NARROWEST, min(WIDEST, round(w * length))) for w in WIDTHS]
    sizes = list(zip([length, *widths], [*widths, outputs], strict=True))
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(sizes):
        last = i == len(sizes) - 1
        linear = nn.Linear(before, after, device="meta").to_empty(
            device="cpu"
        )  # nothing is drawn from the global generator
        scale = (0.1 if last else 1.0) * math.sqrt(2.0 / before)
        with torch.no_grad():
            linear.weight.copy_(normal(seed, f"{name}/weight-{i}", before * after).view(after, before) * scale)
            linear.bias.zero_()
        layers += [linear] if last else [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def _train(
    network: nn.Sequential, inputs: torch.Tensor, truth: torch.Tensor, held: int, loss: Loss, seed: int,
    name: str,
) -> int:  # fmt: skip
    """Adam on minibatches of all rows but the first `held`, whose loss ends it; returns the best epoch, from 1."""
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    best, lowest, state = 0, math.inf, copy.deepcopy(network.state_dict())
    for epoch in range(1, EPOCHS + 1):
        order = held + permutation(seed, f"{name}/epoch-{epoch}", len(inputs) - held)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            optimizer.zero_grad()
            torch.autograd.backward([loss(network(inputs[batch]), truth[batch])])
            optimizer.step()
        with torch.no_grad():
            now = float(loss(network(inputs[:held]), truth[:held]))
        if now < lowest:
            best, lowest, state = epoch, now, copy.deepcopy(network.state_dict())
        elif epoch - best >= PATIENCE:
            break
    network.load_state_dict(state)
    return best


@torch.no_grad()
def _apply(network: nn.Sequential, inputs: torch.Tensor) -> Values:
    found: Values = network(inputs).double().numpy()
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are cut into pieces by the number of threads, and training would carry the difference on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
