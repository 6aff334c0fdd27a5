"""What DaaR finds where domains are known but hidden, and how fast it reads: the parts of daar.py without tunings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_mutual_info_score as ami
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize
from tunings import Setting, choose, report_of, rows_of, usable, write

from honeloom import lab
from honeloom.backends.hf.embed import Embedder
from honeloom.backends.hf.load import Loading
from honeloom.backends.hf.states import layers_of
from honeloom.selection.config import HiddenEmbedding
from honeloom.selection.daar_config import DaarConfig
from honeloom.selection.domains import discover
from honeloom.selection.probe import entropy
from honeloom.selection.vectors import unit_blocks
from honeloom.types.rows import Row

Vectors = npt.NDArray[np.float32]
RUNS = range(3)
SEED_ROWS = 12
DEPTHS = (0.0, 0.1, 0.33, 0.5, 0.75, 1.0)
DOMAINS = 21
DEFAULT = DaarConfig()
CLUSTERED = DEFAULT.embedding.depth if isinstance(DEFAULT.embedding, HiddenEmbedding) else 0.5
PROBED = DEFAULT.depth
"""Of the model: where domains are found, and where the probe reads."""
TIMED_ROWS, ROUNDS, PADDED = 200, 5, 1024


def vectors(setting: Setting, rows: Sequence[Row], depth: float) -> Vectors:
    """Rows as selectors see them: mean hidden states, standardised, of length 1."""
    embedder = Embedder.open(setting.folder, layer=depth, loading=Loading("cpu"), batch_size=setting.scored)
    raw = np.concatenate(list(embedder.embed(rows)))
    return np.concatenate(list(unit_blocks(raw, standardise=True)))


def plain(found: Vectors, count: int, seed: int) -> npt.NDArray[np.int64]:
    """k-means as everyone has it."""
    labels: npt.NDArray[np.int64] = KMeans(count, n_init=10, random_state=seed).fit_predict(found)
    return labels


def words(rows: Sequence[Row], seed: int) -> dict[str, Vectors]:
    """TF-IDF of question and answer, reduced to 100 numbers: plain, of length 1, and with logarithmic counts too."""
    texts = [f"{row.prompt}\n{row.response}" for row in rows]

    def reduced(**settings: Any) -> Vectors:
        found: Vectors = TruncatedSVD(100, random_state=seed).fit_transform(
            TfidfVectorizer(**settings).fit_transform(texts)
        )
        return found

    plain_words = reduced()
    logarithmic = normalize(reduced(sublinear_tf=True, min_df=2))
    return {"words": plain_words, "even words": normalize(plain_words), "log words": logarithmic}


def columns(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = pq.read_table(folder / "scores.parquet").to_pydict()
    return found


# the lab, its labels hidden


def lab_seeds(out: Path) -> Path:
    """Twelve dev rows of each of the eight domains; none is in the pool."""
    seen: dict[str, int] = {}
    kept = []
    for row in lab.rows("dev"):
        name = row["domain"].rstrip("+")
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= SEED_ROWS:
            kept.append({**row, "domain": name})
    return write(out / "lab-seeds.jsonl", kept)


def of_the_lab(setting: Setting, out: Path) -> list[dict[str, Any]]:
    """Pseudo-domains, probe and entropy beside what was planted, with seed rows and with nothing given."""
    seeds, planted = lab_seeds(out), lab.truth("pool")
    given = list(rows_of(str(seeds)).values())
    found = []
    for path, method in (("seeds", {"seeds": str(seeds)}), ("nothing", {})):
        for seed in RUNS:
            folder = choose(setting, out, {"type": "daar", **method}, seed)
            table, details = columns(folder), report_of(folder)["details"]
            rows = [rows_of(setting.pool)[i] for i in table["id"]]
            first = len(given) if path == "seeds" else 0
            held = vectors(setting, [*given[:first], *rows], CLUSTERED)[first:]
            between = np.array([planted[i]["between"] is not None for i in table["id"]])
            true = np.array([planted[i]["domain"].rstrip("+") for i in table["id"]])[~between]
            count = len(details["domains"])
            same = plain(held, count, seed)
            found.append(
                {"path": path, "seed": seed, "count": count, "accuracy": details["probe"]["accuracy"],
                 "ami": float(ami(true, np.array(table["cluster"])[~between])),
                 "plain": float(ami(true, same[~between])),
                 "auc": float(roc_auc_score(between, table["entropy"])), "between": int(between.sum()),
                 "pure": int((~between).sum())}
            )  # fmt: skip
            print(found[-1], flush=True)
    return found


def theory() -> dict[str, float]:
    """Rank correlation of the error of hard assignment with the entropy, on mixtures of which all is known."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        given = rng.dirichlet(np.full(400, 0.15), size=4)
        given[1:, :80] = 0  # rows of one domain only
        given /= given.sum(axis=1, keepdims=True)
        prior, wanted = rng.dirichlet(np.full(4, 5.0)), rng.dirichlet(np.full(4, 5.0))
        joint = prior[:, None] * given
        joint = joint[:, joint.sum(axis=0) > 0]
        posterior = (joint / joint.sum(axis=0)).T
        weight = wanted / prior
        error = (posterior @ weight - weight[posterior.argmax(axis=1)]) ** 2
        unsure = entropy(posterior)
        if not ((error < 1e-24) == (unsure < 1e-12)).all():
            raise RuntimeError("the error is zero elsewhere than the entropy")
        found.append(float(spearmanr(error, unsure)[0]))
    return {"mean": float(np.mean(found)), "least": min(found), "most": max(found)}


# real rows


def of_real_rows(setting: Setting, out: Path, known: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Pseudo-domains with nothing given beside words and k-means, by depth; the first lines are the default's."""
    ids = usable(choose(setting, out, {"type": "daar"}))
    rows = [rows_of(setting.pool)[i] for i in ids]
    truth = [np.array([known[i][k] for i in ids]) for k in (0, 1)]
    lexical = {seed: words(rows, seed) for seed in RUNS}
    found: list[dict[str, Any]] = []
    for depth in DEPTHS:
        held = vectors(setting, rows, depth)
        for seed in RUNS:
            for count in (None, DOMAINS):
                domains, _ = discover(held, count, ids=ids, seed=seed)
                spaces = {"plain": held, **lexical[seed]}
                labels = {name: plain(space, domains.count, seed) for name, space in spaces.items()}
                areas = {k: [float(ami(t, v)) for t in truth] for k, v in {"ours": domains.labels, **labels}.items()}
                found.append({"depth": depth, "seed": seed, "asked": count, "count": domains.count, **areas})
        print("depth", depth, found[-1], flush=True)
    for seed in RUNS:  # end to end, the same figures
        table = columns(choose(setting, out, {"type": "daar"}, seed))
        mine = next(f for f in found if f["depth"] == CLUSTERED and f["seed"] == seed and f["asked"] is None)
        if [float(ami(t, table["cluster"])) for t in truth] != mine["ours"]:
            raise RuntimeError("select found other domains than discover on the same vectors")
    return found


# throughput


def one_by_one(embedder: Embedder, rows: Sequence[Row]) -> None:
    """The released way: one row at a time, padded to 1,024; nothing behind the probe's layer is computed."""

    class Reached(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Reached

    model = embedder.model
    handle = layers_of(model, embedder.architecture)[embedder.layer].register_forward_hook(stop)
    ids, mask = torch.zeros((1, PADDED), dtype=torch.long), torch.zeros((1, PADDED), dtype=torch.long)
    for row in rows:
        encoded = embedder.encoder.encode(row)
        ids.zero_(), mask.zero_()
        ids[0, : len(encoded.ids)], mask[0, : len(encoded.ids)] = torch.tensor(encoded.ids), 1
        try:
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        except Reached:
            pass
    handle.remove()


def throughput(setting: Setting) -> dict[str, Any]:
    """Seconds for the same rows both ways, in turn, tokenising included."""
    rows = list(rows_of(setting.pool).values())[:TIMED_ROWS]

    def opened(batch: int) -> Embedder:
        return Embedder.open(setting.folder, layer=PROBED, loading=Loading("cpu"), batch_size=batch)

    torch.set_num_threads(1)
    ours, single = opened(16), opened(1)
    tokens = sum(len(ours.encoder.encode(row).ids) for row in rows)
    apart = np.abs(np.concatenate(list(ours.embed(rows))) - np.concatenate(list(single.embed(rows)))).max()
    seconds: dict[str, list[float]] = {"batches": [], "padded": []}
    ways: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("batches", lambda: list(ours.embed(rows))), ("padded", lambda: one_by_one(single, rows))
    )  # fmt: skip
    for _ in range(ROUNDS):
        for name, way in ways:
            begun = time.process_time()
            way()
            seconds[name].append(time.process_time() - begun)
    fastest = {name: min(values) for name, values in seconds.items()}
    found = {
        "rows": len(rows), "tokens": tokens, "token_ratio": len(rows) * PADDED / tokens,
        "time_ratio": fastest["padded"] / fastest["batches"], "apart": float(apart), "seconds": seconds,
    }  # fmt: skip
    print(found, flush=True)
    return found
