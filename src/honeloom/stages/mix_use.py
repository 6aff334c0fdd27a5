"""How a mixture uses its experts: on rows of the domains, on prompts, or on two sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from honeloom.backends.devices import one_thread
from honeloom.backends.hf.compare import probe_ids
from honeloom.backends.hf.load import load_tokenizer
from honeloom.backends.hf.mixture_gates import RouterSpec, build_gate
from honeloom.backends.hf.mixture_use import expert_shares
from honeloom.backends.hf.router_inputs import Span, received
from honeloom.backends.hf.streamed import source_weights, streamed_model
from honeloom.mixture.config import MixConfig
from honeloom.mixture.own_format import PROMPT_TOKENS
from honeloom.stages.mix_checks import opened_mixture
from honeloom.stages.mix_inputs import Design, Parts, hidden_size
from honeloom.stages.mix_router import Gates, gate_places, plain_config
from honeloom.stages.mix_rows import prompt_spans
from honeloom.stages.work import Work

__all__ = ["Use", "measure_use"]

ROWS, TOKENS = 64, 64
"""Rows, and tokens of each, that are looked at: one forward pass."""


@dataclass(frozen=True, slots=True)
class Use:
    """Shares of the experts, over all rows and by domain."""

    shares: tuple[float, ...]
    domains: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {"utilisation": list(self.shares), "domains": list(self.domains)}


@dataclass(frozen=True, slots=True)
class _Row:
    ids: tuple[int, ...]
    read: int
    domain: str


def measure_use(work: Work[MixConfig], parts: Parts, design: Design, gates: Gates) -> Use:
    """Let the written mixture read some rows, and count which experts it takes."""
    rows = _rows(work, parts, gates)
    with one_thread(torch.device("cpu")):
        if work.config.whole_models:
            shares = _of_models(parts, design, gates, rows, work.config)
        else:
            with opened_mixture(work, design) as model:
                shares = expert_shares(model, len(parts.experts), [r.ids for r in rows], [r.read for r in rows])
    domains = []
    for domain in dict.fromkeys(r.domain for r in rows):
        picked = [i for i, r in enumerate(rows) if r.domain == domain]
        domains.append({"domain": domain, "rows": len(picked), "shares": shares[picked].mean(dim=0).tolist()})
    return Use(tuple(shares.mean(dim=0).tolist()), tuple(domains))


def _rows(work: Work[MixConfig], parts: Parts, gates: Gates) -> list[_Row]:
    source = parts.encoder or parts.trunk
    known = gates.domains
    if known is not None:
        step = max(1, len(known.rows) / ROWS)
        picked = [int(i * step) for i in range(min(ROWS, len(known.rows)))]
        return [_of_row(known, i, work.config.names) for i in picked]
    tokenizer, chat = load_tokenizer(source.tokenizer_folder), work.config.input == "sample"
    if any(e.prompts for e in work.config.experts):
        named = zip(work.config.names, work.config.experts, strict=True)
        spans = [(n, s) for n, e in named for s in prompt_spans(source, e.prompts, "mean", chat=chat)][:ROWS]
        return [_Row(s.ids[:TOKENS], min(TOKENS, len(s.ids)), f"prompts of {name}") for name, s in spans]
    probes = probe_ids(tokenizer, plain_config(source), work.config.seed)
    return [_of_ids(ids, "two sentences" if tokenizer else "seeded token ids") for ids in probes]


def _of_row(known: Any, index: int, names: Sequence[str]) -> _Row:
    row, encoded = known.rows[index], known.encoded[index]
    label = "" if known.labels is None else f"rows of {names[int(known.labels[index])]}"
    return _Row(encoded.ids[:TOKENS], min(encoded.prompt, TOKENS), row.domain or label or "rows")


def _of_ids(ids: Sequence[int], domain: str) -> _Row:
    kept = tuple(ids)[:TOKENS]
    return _Row(kept, min(PROMPT_TOKENS, len(kept)), domain)


def _of_models(parts: Parts, design: Design, gates: Gates, rows: Sequence[_Row], config: MixConfig) -> torch.Tensor:
    """Choices among whole models: the encoder reads every prompt."""
    source = parts.encoder or parts.trunk
    key, place = next(iter(gate_places(config, parts, design).items()))
    vectors = torch.zeros(len(rows), hidden_size(source.config))

    def keep(_: int, span: int, found: torch.Tensor) -> None:
        vectors[span] = found[0]

    with streamed_model(plain_config(source), source_weights(source)) as model:
        received(model, source.architecture, [place], [Span(r.ids[: r.read]) for r in rows], keep)
    gate = build_gate(RouterSpec(**gates.spec), len(parts.experts), vectors.shape[1])
    gate.load_state_dict(gates.by_key[key].tensors)
    with torch.inference_mode():
        chosen = gate(vectors).argmax(dim=1)
    return torch.nn.functional.one_hot(chosen, len(parts.experts)).double()
