"""Importances that were measured before, kept by what they are of: light, for a plan reads them too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from honeloom import __version__
from honeloom.dropping.config import DropConfig
from honeloom.dropping.scores import Score, UnitScores
from honeloom.errors import ConfigError
from honeloom.registry import family
from honeloom.runs.atomic import write_json
from honeloom.runs.keys import stage_key
from honeloom.stages.inputs import ResolvedInput

__all__ = ["ScoreCache", "cache_folder", "read_scores", "score_key"]

SCHEMA = "honeloom.importances/1"
_DECIDES = ("limit", "split", "strict", "max_bad", "seed", "samples", "max_length", "dtype", "device", "attn", "on_nan")
"""Settings that decide which token ids are read, and in what number type."""


def cache_folder() -> Path:
    """Where importances are kept: below HONELOOM_CACHE, else XDG_CACHE_HOME/honeloom, else ~/.cache/honeloom."""
    own, shared = os.environ.get("HONELOOM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own) / "importances"
    return Path(shared or Path.home() / ".cache") / "honeloom" / "importances"


def score_key(config: DropConfig, inputs: Mapping[str, ResolvedInput], windows: tuple[int, ...]) -> str:
    """Key of importances: content of model and rows, what decides the token ids, metric and versions.

    Parameters
    ----------
    windows : tuple of int
        Numbers of neighbouring blocks that are scored too.
    """
    settings = config.model_dump(mode="json")
    chosen = {name: settings[name] for name in _DECIDES}
    version = family("dropping").get(config.metric.type).version
    made = {**chosen, "metric": settings["metric"], "windows": list(windows), "package": __version__}
    read = [i.fingerprint for place, i in inputs.items() if place == "model" or place.startswith("calibration.")]
    return stage_key("importances", version, made, read)


class ScoreCache:
    """One entry.

    Parameters
    ----------
    key : str
        From `score_key`.
    """

    def __init__(self, key: str) -> None:
        self.path = cache_folder() / f"{key}.json"

    def read(self, token_ids: str | None = None) -> UnitScores | None:
        """The importances; None where there are none, they are damaged, or of other token ids.

        Parameters
        ----------
        token_ids : str, optional
            Digest of the token ids that would be read; not compared where it is not known.
        """
        try:
            saved: Any = json.loads(self.path.read_bytes())
            if saved["schema"] != SCHEMA or (token_ids is not None and saved["token_ids"] != token_ids):
                return None
            return UnitScores.from_json(saved["scores"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a cache that cannot be read is one that has nothing

    def write(self, scores: UnitScores, token_ids: str) -> bool:
        """Keep importances; false where the folder cannot be written, which loses no result."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"schema": SCHEMA, "token_ids": token_ids, "scores": scores.to_json()})
        except OSError:
            return False
        return True


def read_scores(file: Path, config: DropConfig, layers: int) -> UnitScores:
    """Importances that an earlier drop has written.

    Raises
    ------
    ConfigError
        The file holds none, they are of another metric, or of a model with other layers.
    """
    try:
        saved: Any = json.loads(file.read_bytes())
        found = {
            kind: {s["layer"]: Score(float(s["value"]), s["stderr"]) for s in saved[kind]}
            for kind in ("attention", "mlp", "block")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"scores {file}: not the scores.json of a drop ({error!r})") from None
    report = _beside(file)
    metric = report.get("details", {}).get("metric") or report.get("details", {}).get("plan", {}).get("metric")
    if metric is not None and metric != config.metric.type:
        raise ConfigError(
            f"scores {file}: of the metric {metric}, and metric is {config.metric.type}; add --metric {metric}"
        )
    beyond = [layer for scores in found.values() for layer in scores if not 0 <= layer < layers]
    if beyond:
        raise ConfigError(f"scores {file}: of layer {beyond[0]}, and the model has layers 0 to {layers - 1}")
    attention, mlp, block = (tuple(scores.get(i) for i in range(layers)) for scores in found.values())
    return UnitScores(attention, mlp, block)


def _beside(file: Path) -> Mapping[str, Any]:
    """The report beside a file, if there is one."""
    try:
        report: Any = json.loads((file.parent / "report.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
