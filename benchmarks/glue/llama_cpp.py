"""A mixture of four real experts in llama.cpp: its logits against those of transformers. Writes LLAMA_CPP.md.

    HONELOOM_LLAMA_PYTHON=PYTHON OMP_WAIT_POLICY=PASSIVE python benchmarks/glue/llama_cpp.py [DATA] [--out DIR]

The zoo is that of zoo.py. Four of its experts become one Mixtral by `mix` (level ffn), which `export` writes as GGUF.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import honeloom
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer
from honeloom.backends.llama_cpp import Answer, ask_llama_cpp
from zoo import Zoo, arguments, build, read_rows

HERE = Path(__file__).resolve().parent
EXPERTS = ("math", "code", "medical", "fact-check")
ROWS, TOKENS = 64, 256
BAR = 2e-2
TIE = 2e-3
"""A token whose second and third expert are this near in router logits may take either after any rounding."""


def mixture(zoo: Zoo, folder: Path) -> Path:
    """Four experts on base6m, chosen by routers that follow from rows."""
    config: dict[str, Any] = {
        "level": "ffn",
        "base_model": str(zoo.base),
        "experts": [{"model": str(zoo.models[n]), "name": n, "rows": [str(zoo.tuned[n])]} for n in EXPERTS],
        "router": {"type": "rows", "examples": 64},
        "format": "mixtral",
    }
    honeloom.mix(config, folder, mode="resume")
    return folder


def row_ids(zoo: Zoo, tokenizer: Any) -> list[list[int]]:
    """Token ids of rows from every domain that reports."""
    rows = read_rows(zoo.report)
    texts = [r["text"] if "text" in r else f"{r['instruction']}\n{r['output']}" for r in rows[:: len(rows) // ROWS]]
    return [tokenizer(text)["input_ids"][:TOKENS] for text in texts[:ROWS]]


@torch.inference_mode()
def source(model: Any, rows: Sequence[list[int]]) -> Iterator[tuple[torch.Tensor, int]]:
    """Logits of each row, and how many of its positions come before the first near tie between experts."""
    used = model.config.num_experts_per_tok
    for row in rows:
        found = model(torch.tensor([row]), output_router_logits=True)
        ties = torch.zeros(len(row), dtype=torch.bool)
        for logits in found.router_logits:
            best = logits.sort(dim=-1, descending=True).values
            ties |= best[:, used - 1] - best[:, used] < TIE
        yield found.logits[0], int(ties.nonzero()[0, 0]) if ties.any() else len(row)


def line(name: str, size: int, expected: Sequence[tuple[torch.Tensor, int]], answer: Answer) -> str:
    """One row of the table."""
    gaps = [(logits - torch.tensor(found)).abs() for (logits, _), found in zip(expected, answer.rows, strict=True)]
    every = torch.cat(gaps)
    sure = torch.cat([gap[:count] for gap, (_, count) in zip(gaps, expected, strict=True)])
    above = float((every.amax(dim=-1) > BAR).float().mean())
    cells = (
        name,
        f"{size / 1e6:.1f}",
        f"{every.max():.4f}",
        f"{every.mean():.5f}",
        f"{above:.1%}",
        f"{sure.max():.4f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Mix, export, compare."""
    given = arguments()
    zoo = build(given.data, given.out)
    place = given.out / "llama-cpp"
    folder = mixture(zoo, place / "mixture")
    rows = row_ids(zoo, load_tokenizer(folder))
    expected = list(source(load_model(folder, loading=Loading("cpu", "fp32")), rows))
    spread = float(torch.cat([logits for logits, _ in expected]).std())
    lines, version = [], ""
    for quant in ("f16", "q8_0"):
        out = place / quant
        report = honeloom.export(folder, out, quant=quant, mode="resume")
        answer = ask_llama_cpp(out / "model.gguf", rows=rows)
        lines.append(line(quant, report.details["bytes"], expected, answer))
        version = answer.version
        print(lines[-1], flush=True)
    positions, sure = sum(map(len, rows)), sum(count for _, count in expected)
    text = "\n".join(page(lines, version, spread, positions, sure))
    (HERE / "LLAMA_CPP.md").write_text(text + "\n", encoding="utf-8")


def page(lines: Sequence[str], version: str, spread: float, positions: int, sure: int) -> list[str]:
    """The page, line by line."""
    head = (
        "type",
        "MB",
        "largest difference",
        "mean difference",
        f"positions above {BAR}",
        "largest before a near tie",
    )
    return [
        "# A mixture in llama.cpp",
        "",
        f"Command: `python benchmarks/glue/llama_cpp.py`. {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, {version} on one CPU thread.",
        "",
        f"Four experts of the zoo ({', '.join(EXPERTS)}) as one Mixtral of 12 layers, two experts per token,",
        "mixed by `mix` at level ffn with routers from rows, exported as GGUF of architecture llama. Logits of",
        f"llama.cpp against those of transformers in float32, over {ROWS} rows of real text: {positions:,} positions,",
        f"all 4,096 tokens of each. The logits have a standard deviation of {spread:.2f}.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
        *lines,
        "",
        f"The last column leaves out {positions - sure:,} positions: what comes after a token whose second and third",
        f"expert are within {TIE} in some layer's router logits. Such a token may take either expert after any",
        "rounding, and every later token of its row sees that. llama.cpp keeps keys and values in float16.",
        "",
        "## Not reached",
        "",
        f"Logits within {BAR} at every position, wherever the largest difference in the table is above that.",
    ]


if __name__ == "__main__":
    main()
