"""What a federation keeps on disk, so that it can go on after a kill: the state after every round, and replies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from honeloom.checkpoint.headers import read_header
from honeloom.checkpoint.reader import Checkpoint
from honeloom.federated.rates import RateMemory
from honeloom.federated.scalars import log_of, moves_of
from honeloom.federated.state import RoundRecord, ServerState
from honeloom.runs.atomic import write_bytes
from honeloom.runs.journal import Journal, read_journal

__all__ = ["RoundStore"]

Pair = tuple[torch.Tensor, torch.Tensor]
ROUNDS = "rounds.jsonl"
STATE = ".state"
POOL, LOG, OPENED = "pool", "log", "opened-"


class RoundStore:
    """Files of one federation below a folder: `rounds.jsonl` stays, `.state` is scratch.

    A round is done once its line stands in rounds.jsonl; its state was written before.

    Parameters
    ----------
    folder : Path
        Of the output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / STATE
        self.scratch.mkdir(exist_ok=True)

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """Lines of the rounds that are done in a folder."""
        return list(read_journal(folder / ROUNDS))

    def records(self) -> list[dict[str, Any]]:
        """Lines of the rounds that are done."""
        return self.read(self.folder)

    def load(self) -> ServerState:
        """The state after the last round that is done."""
        done = len(self.records())
        return self._read(self.scratch / f"state-{done:06}.safetensors") if done else ServerState()

    def save(self, state: ServerState, *records: RoundRecord) -> None:
        """Make rounds done, of which the last led to the state and others changed nothing; older scratch is removed."""
        for record in records:
            path = self.scratch / f"state-{record.round:06}.safetensors"
            write_bytes(path, _packed(replace(state, round=record.round)))
            with Journal(self.folder / ROUNDS) as journal:
                journal.append(record.to_json())
        for old in self.scratch.iterdir():
            if old != path:
                old.unlink()

    def keep_reply(self, number: int, client: str, data: bytes) -> None:
        """Keep a reply of a round that is not done."""
        write_bytes(self.scratch / f"reply-{number:06}-{client}.safetensors", data)

    def note_opened(self, number: int) -> None:
        """Note, before it is asked for, that a round's secure sum may be opened: its steps must not be summed again."""
        write_bytes(self.scratch / f"{OPENED}{number:06}", str(self.opened(number) + 1).encode())

    def opened(self, number: int) -> int:
        """How often that was noted of a round."""
        path = self.scratch / f"{OPENED}{number:06}"
        return int(path.read_bytes()) if path.exists() else 0

    def replies(self, number: int) -> Iterator[tuple[str, bytes]]:
        """Replies that were kept, by client."""
        head = f"reply-{number:06}-"
        for path in sorted(self.scratch.glob(f"{head}*.safetensors")):
            yield path.name.removeprefix(head).removesuffix(".safetensors"), path.read_bytes()

    def _read(self, path: Path) -> ServerState:
        plain = json.loads(read_header(path).metadata["state"])
        with Checkpoint(path.parent, [path]) as file:
            state = ServerState(plain["round"], held=plain["held"], rows=plain["rows"], norm=plain["norm"])
            state.frozen.entries = [{} for _ in range(plain["additions"])]
            state.frozen.first = plain["first"]
            state.rates = RateMemory(**plain["rates"])
            state.log.first = plain["log"]["first"]
            if plain["log"]["moves"]:
                log = tuple((k, tuple((c, share, lr) for c, share, lr in who)) for k, who in plain["log"]["moves"])
                state.log.entries = moves_of(log, file.read(LOG), *plain["log"]["shape"])
            pairs: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
            for name in file.names():
                if name == POOL:
                    state.pool = file.read(name).numpy()
                if name in (POOL, LOG):
                    continue
                group, module, factor = name.split("!")
                pairs.setdefault((group, module), {})[factor] = file.read(name)
        for (group, module), pair in pairs.items():
            found = (pair["b"], pair["a"])
            if group == "latest":
                state.frozen.latest[module] = found
            elif group.startswith("addition-"):
                state.frozen.entries[int(group.removeprefix("addition-"))][module] = found
            elif group.startswith("correction-"):
                state.corrections.setdefault(group.removeprefix("correction-"), {})[module] = found
            else:
                getattr(state, group)[module] = found
        return state


def _packed(state: ServerState) -> bytes:
    groups: dict[str, Mapping[str, Pair]] = {
        "shared": state.shared, "control": state.control, "moments": state.moments,
        "latest": state.frozen.latest,
        **{f"addition-{k}": addition for k, addition in enumerate(state.frozen.entries)},
        **{f"correction-{name}": pairs for name, pairs in state.corrections.items()},
    }  # fmt: skip
    tensors = {
        f"{group}!{module}!{factor}": tensor.contiguous().clone()
        for group, pairs in groups.items()
        for module, pair in pairs.items()
        for factor, tensor in zip("ba", pair, strict=True)
    }
    if state.pool is not None:
        tensors[POOL] = torch.from_numpy(state.pool.copy())
    log, tensors[LOG] = log_of(state.log.entries)
    shape = state.log.entries[0].scalars.shape[1:] if state.log.entries else (0, 0)
    plain = {
        "log": {"first": state.log.first, "moves": log, "shape": list(shape)}, "rates": asdict(state.rates),
        "round": state.round, "held": state.held, "rows": state.rows, "norm": state.norm,
        "first": state.frozen.first, "additions": len(state.frozen.entries),
    }  # fmt: skip
    data: bytes = save(tensors, metadata={"state": json.dumps(plain, sort_keys=True)})
    return data
