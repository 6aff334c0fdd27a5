"""Seed rows written by a model: one line says what a domain is, and samples that are alike are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.ops.noise import keyed_uniform
from honeloom.types.ports import GeneratePort, SelectionData
from honeloom.types.rows import Row, Turn, Where

__all__ = ["SAMPLES_FILE", "Synthesis", "augmentation_prompt", "parse_samples", "seed_prompt", "synthesise"]

SAMPLES_FILE = "samples.jsonl"
MOST_CALLS, PER_CALL = 60, 4
"""Times that a domain is asked for samples, and answers of one time."""
GIVE_UP = 12
"""Calls without one readable answer after which a domain is given up."""
REFUSALS, STEP, LOOSEST = 12, 0.02, 0.98
"""Samples refused in a row after which the threshold rises, by how much, and how far."""
FEWEST = 3
"""Samples without which a domain has no usable centroid."""
SHOWN = 3
MAX_NEW, TEMPERATURE, TOP_P = 1024, 0.9, 0.95
_PAIR = re.compile(r"Instruction\s*\d*\s*:(.*?)Response\s*\d*\s*:(.*?)(?=Instruction\s*\d*\s*:|\Z)", re.S | re.I)
Journal = Callable[[dict[str, Any]], None]


@dataclass
class Synthesis:
    """What became of asking a model for samples of domains.

    Attributes
    ----------
    rows : list of Row
        Accepted samples, with their domain.
    failed : str or None
        Why there are no usable samples; then `rows` is empty.
    counts : dict
        Per domain: accepted, refused, unreadable, calls, and the last similarity threshold.
    """

    rows: list[Row] = field(default_factory=list)
    failed: str | None = None
    counts: dict[str, dict[str, float]] = field(default_factory=dict)


def seed_prompt(name: str, domains: Mapping[str, str]) -> str:
    """Ask for the first samples of a domain, and for none of the others."""
    others = "\n".join(f"- {text}" for other, text in domains.items() if other != name)
    return (
        f"Write five training examples for a language model. Every example belongs to this domain: {domains[name]}\n"
        f"No example may belong to any of these other domains:\n{others}\n"
        "The five examples differ from each other in topic and wording. Use exactly this form for every example, "
        "and write nothing else:\nInstruction: <what a user asks>\nResponse: <a complete answer>"
    )


def augmentation_prompt(name: str, domains: Mapping[str, str], shown: Sequence[Row]) -> str:
    """Ask for one sample more, unlike those that are shown."""
    known = "\n\n".join(f"Instruction: {row.prompt}\nResponse: {row.response}" for row in shown)
    return (
        f"Here are training examples of this domain: {domains[name]}\n\n{known}\n\n"
        "Write one new example of the same domain that resembles none of them: another topic, another kind of question "
        "and other words. Use exactly this form, and write nothing else:\n"
        "Instruction: <what a user asks>\nResponse: <a complete answer>"
    )


def parse_samples(text: str) -> list[tuple[str, str]]:
    """Pairs of instruction and response in what a model wrote; a pair with an empty part is left out."""
    pairs = ((a.strip(), b.strip()) for a, b in _PAIR.findall(text))
    return [(a, b) for a, b in pairs if a and b]


def synthesise(data: SelectionData, domains: Mapping[str, str], *, samples: int, similarity: float) -> Synthesis:
    """Let the model write `samples` rows of every domain, no two more alike than a threshold.

    Parameters
    ----------
    data : SelectionData
        With `open_generator`, and `open_journal` for what was written: an interrupted attempt
        goes on where it was.
    domains : mapping of str to str
        Name -> one line that says what belongs to it.
    samples : int
        Rows per domain.
    similarity : float
        A sample is accepted if its cosine with every accepted one of the domain, between mean
        input embeddings, is below. After 12 refusals in a row the threshold rises by 0.02.

    Returns
    -------
    Synthesis
        A domain that reaches only 3 samples in 60 calls of 4 answers is taken as it is; one
        that does not makes the whole fail, as does a domain that wrote nothing readable in 12
        calls.

    References
    ----------
    Ling et al. 2025, arXiv:2502.04380, section 4; the bounds are ours.
    """
    found = Synthesis()
    with data.open_journal(SAMPLES_FILE) as (before, write):
        kept = {(record["domain"], record["call"]): record["texts"] for record in before}
        port = data.open_generator()
        for name in domains:
            domain = _Domain(name, domains, port, data.seed, samples, similarity)
            domain.run(kept, write)
            found.counts[name] = domain.counts()
            if len(domain.rows) < min(FEWEST, samples):
                found.failed = (
                    f"the model wrote {len(domain.rows)} usable samples of domain {name!r} in {domain.calls} calls "
                    f"({domain.unreadable} answers were unreadable, {domain.refused} samples too much alike)"
                )
                found.rows.clear()
                return found
            found.rows += domain.rows
    return found


class _Domain:
    """The samples of one domain, as they come in."""

    def __init__(
        self, name: str, domains: Mapping[str, str], port: GeneratePort, seed: int, samples: int, similarity: float
    ) -> None:
        self.name, self.domains, self.port, self.seed, self.samples = name, domains, port, seed, samples
        self.threshold = similarity
        self.rows: list[Row] = []
        self.calls = self.refused = self.unreadable = self._in_a_row = 0
        self._directions: list[npt.NDArray[np.float64]] = []

    def counts(self) -> dict[str, float]:
        """What became of the answers."""
        return {
            "accepted": len(self.rows), "refused": self.refused, "unreadable": self.unreadable, "calls": self.calls,
            "similarity": self.threshold,
        }  # fmt: skip

    def run(self, kept: Mapping[tuple[str, int], list[str]], write: Journal) -> None:
        """Ask until there are enough samples, or it is no use; what was written before is not asked for again."""
        while len(self.rows) < self.samples and self.calls < MOST_CALLS:
            if self.calls >= GIVE_UP and not self.rows and not self.refused:
                return
            texts = kept.get((self.name, self.calls))
            answers = self._ask() if texts is None else texts
            judged = [sample for text in answers for sample in self._judge(text)]
            if texts is None:
                write({"domain": self.name, "call": self.calls, "texts": answers, "samples": judged})
            self.calls += 1

    def _ask(self) -> list[str]:
        prompt = seed_prompt(self.name, self.domains)
        if self.rows:
            draws = keyed_uniform(self.seed, f"synthesis/{self.name}/{self.calls}", [row.id for row in self.rows])
            prompt = augmentation_prompt(self.name, self.domains, [self.rows[i] for i in np.argsort(draws)[:SHOWN]])
        place = int(keyed_uniform(self.seed, "synthesis", [f"{self.name}/{self.calls}"])[0] * 2**53)
        return self.port.generate(
            [prompt] * PER_CALL, seed=place, max_new_tokens=MAX_NEW, temperature=TEMPERATURE, top_p=TOP_P
        )

    def _judge(self, text: str) -> list[dict[str, Any]]:
        """What is said of every sample of one answer; accepted ones are kept."""
        pairs = parse_samples(text)
        self.unreadable += not pairs
        return [self._consider(*pair) for pair in pairs]

    def _consider(self, instruction: str, response: str) -> dict[str, Any]:
        vector = self.port.vectors([f"{instruction}\n{response}"])[0].astype(np.float64)
        length = float(np.linalg.norm(vector))
        direction = vector / length if length > 0 else vector
        closest = max((float(direction @ other) for other in self._directions), default=-1.0)
        accepted = length > 0 and math.isfinite(length) and closest < self.threshold and len(self.rows) < self.samples
        record = {
            "instruction": instruction, "response": response, "accepted": accepted, "closest": closest,
            "threshold": self.threshold,
        }  # fmt: skip
        if accepted:
            turns = (Turn("user", instruction), Turn("assistant", response))
            where = Where(SAMPLES_FILE, self.calls + 1)
            row_id = f"{self.name}/{len(self.rows):03}"
            self.rows.append(Row(row_id, "chat", where, "synthesis", self.name, turns))
            self._directions.append(direction)
            self._in_a_row = 0
        elif len(self.rows) < self.samples:
            self.refused += 1
            self._in_a_row += 1
            if self._in_a_row >= REFUSALS and self.threshold < LOOSEST:
                self.threshold, self._in_a_row = round(min(LOOSEST, self.threshold + STEP), 6), 0
        return record
