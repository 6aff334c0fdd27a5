"""Who holds which rows: splits of one set of rows among clients, as a simulation needs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.errors import RowsError
from honeloom.federated.federate_parts import PartitionConfig
from honeloom.ops.noise import keyed_uniform
from honeloom.types.ports import RowTable

__all__ = ["partition", "partition_record"]

Places = list[list[int]]


def partition(rows: RowTable, config: PartitionConfig, *, seed: int) -> dict[str, list[int]]:
    """Split rows among clients; which row goes where follows from ids, labels and the seed alone.

    Parameters
    ----------
    rows : RowTable
        N rows; `domain` and `dirichlet` go by their domains.
    config : PartitionConfig
        iid: alike parts of equal size. size: alike parts whose sizes fall as 1, 1/2, 1/3, ...
        domain: whole domains, the largest first, each to the client with the fewest rows.
        dirichlet: every domain's rows in shares drawn from Dirichlet(alpha).
    seed : int
        Of the draws.

    Returns
    -------
    dict
        Client id ("client-0", ...) -> places of its rows, ascending; every row has one client.

    Raises
    ------
    RowsError
        A client would have no row, or rows that are split by domain name none.

    References
    ----------
    Hsu, Qi and Brown 2019, arXiv:1909.06335 (Dirichlet).
    """
    order = np.argsort(keyed_uniform(seed, "federated/partition", rows.ids), kind="stable")
    count = config.n
    if len(rows) < count:
        raise RowsError(f"partition: {len(rows)} rows for {count} clients; give more rows, or fewer clients")
    if config.type == "iid":
        parts = [order[k::count] for k in range(count)]
    elif config.type == "size":
        shares = 1.0 / np.arange(1, count + 1)
        parts = _cut(order, shares / shares.sum())
    elif config.type == "domain":
        parts = _by_domain(rows, order, count)
    else:
        parts = _dirichlet(rows, order, config, seed)
    return {f"client-{k}": sorted(part.tolist()) for k, part in enumerate(parts)}


def _groups(rows: RowTable, order: npt.NDArray[np.int64], how: str) -> dict[str, npt.NDArray[np.int64]]:
    """Rows by domain, in the given order; the largest domain first."""
    names = rows.domains
    if all(name is None for name in names):
        raise RowsError(f"partition {how}: no row names a domain; give rows with a `domain`, or use type iid or size")
    found: dict[str, list[int]] = {}
    for i in order.tolist():
        found.setdefault(names[i] or "(none)", []).append(i)
    largest = sorted(found, key=lambda name: (-len(found[name]), name))
    return {name: np.array(found[name], dtype=np.int64) for name in largest}


def _by_domain(rows: RowTable, order: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    groups = _groups(rows, order, "domain")
    if len(groups) < count:
        raise RowsError(
            f"partition domain: {count} clients, and the rows have {len(groups)} domains; use at most as many clients, "
            "or type dirichlet"
        )
    parts: Places = [[] for _ in range(count)]
    for places in groups.values():
        min(parts, key=len).extend(places.tolist())
    return [np.array(part, dtype=np.int64) for part in parts]


def _dirichlet(
    rows: RowTable, order: npt.NDArray[np.int64], config: PartitionConfig, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Shares of every domain by a draw of its own; clients left with too few rows take from the largest."""
    parts: Places = [[] for _ in range(config.n)]
    for name, places in _groups(rows, order, "dirichlet").items():
        key = hashlib.blake2b(f"{seed}/federated/dirichlet/{name}".encode(), digest_size=8).digest()
        shares = np.random.Generator(np.random.Philox(int.from_bytes(key, "little"))).dirichlet(
            np.full(config.n, config.alpha)
        )
        for part, mine in zip(parts, _cut(places, shares), strict=True):
            part.extend(mine.tolist())
    least = min(config.least, len(rows) // config.n)
    for part in parts:
        while len(part) < least:
            part.append(max(parts, key=len).pop())
    return [np.array(part, dtype=np.int64) for part in parts]


def _cut(places: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> list[npt.NDArray[np.int64]]:
    """Consecutive pieces whose sizes follow the shares."""
    ends = np.round(np.cumsum(shares) * len(places)).astype(np.int64)[:-1]
    return np.split(places, ends)


def partition_record(rows: RowTable, parts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The split as a file holds it: per client the ids of its rows and their number by domain, and a hash of it all."""
    ids, domains = rows.ids, rows.domains
    clients = []
    for name, places in parts.items():
        counts: dict[str, int] = {}
        for i in places:
            counts[domains[i] or "(none)"] = counts.get(domains[i] or "(none)", 0) + 1
        clients.append(
            {"id": name, "rows": len(places), "domains": dict(sorted(counts.items())), "ids": [ids[i] for i in places]}
        )
    text = json.dumps([[c["id"], c["ids"]] for c in clients], ensure_ascii=False)
    return {"sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), "clients": clients}
