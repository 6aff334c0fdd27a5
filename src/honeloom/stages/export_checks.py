"""What makes an exported file the model it was made from: its logits, how it cuts texts, how it renders chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError

from honeloom.backends.devices import release_memory
from honeloom.backends.hf.chat import bounded_rendering
from honeloom.backends.hf.compare import divergence, largest_gap, probe_ids, row_logits, spread
from honeloom.backends.hf.load import Loading, load_model, load_tokenizer, max_positions
from honeloom.backends.hf.reload_export import GGUF_NAME
from honeloom.checkpoint.export_config import ExportConfig
from honeloom.errors import TemplateError
from honeloom.registry import load_target
from honeloom.stages.export_texts import CONVERSATIONS, TEXTS
from honeloom.stages.work import Work
from honeloom.types.report import Check

__all__ = ["GAP_LIMIT", "KL_LIMITS", "SPREAD_LIMITS", "check_vocabulary", "compare_logits"]

KL_LIMITS = {"f16": 1e-4, "q8_0": 3e-2}
"""Mean KL divergence in nats that rounding may make.

Measured on these texts with five trained models: f16 0 for bf16 weights and 1e-6 for float32 ones, 2e-6 for a mixture
of six experts; q8_0 2e-4 to 5e-3. Rotary pairs laid out wrongly make it 0.5 to 6.
"""
SPREAD_LIMITS = {"f16": 2e-3, "q8_0": 0.1}
"""Root mean square of differences of logits over the spread of logits: a model that predicts little has no divergence.

Measured with the same models: f16 5e-7 to 4e-4, 8e-4 for the mixture; q8_0 7e-3 to 3e-2; wrong rotary pairs 0.3 to 1.
"""
GAP_LIMIT = 2e-2
"""Largest difference of logits in f16 over their spread, of dense models alone; measured up to 3e-3.

A token whose second and third expert are as good as tied takes the other one after any rounding.
"""


def compare_logits(work: Work[ExportConfig], folder: Path, *, sparse: bool) -> tuple[tuple[Check, ...], dict[str, Any]]:
    """The file, computed by llama.cpp's rules, against the source in transformers.

    Parameters
    ----------
    work : Work
        Its folder has the file.
    folder : Path
        The source.
    sparse : bool
        Whether the model has experts.

    Returns
    -------
    tuple of Check, dict
        Checks, and what was measured: kl, relative_gap, largest_gap, spread, tokens, agreement.
    """
    config = work.config
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        work.log.warn("the source has no tokenizer: the file is compared on seeded token ids, and has no vocabulary")
    model = load_model(folder, loading=Loading(config.device, "fp32" if config.dtype == "auto" else config.dtype))
    longest = max_positions(model.config, tokenizer)
    rows = [row[:longest] for row in probe_ids(tokenizer, model.config, config.seed, TEXTS)]
    expected = row_logits(model, rows)
    del model
    release_memory()
    found = load_target("honeloom.backends.gguf_model:GgufModel")(work.dir / GGUF_NAME).row_logits(rows)
    tokens = sum(len(row) for row in rows)
    kl, gap, scale = divergence(expected, found), largest_gap(expected, found), spread(expected)
    share = spread([a - b for a, b in zip(expected, found, strict=True)]) / scale
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    where = f"{tokens} tokens of {len(TEXTS)} texts" if tokenizer else f"{tokens} seeded token ids (no tokenizer)"
    kept = [("predicts as the source", "mean KL divergence, nats", kl, KL_LIMITS[config.quant])]
    kept.append(("has the source's logits", "differences over their spread", share, SPREAD_LIMITS[config.quant]))
    if config.quant == "f16" and not sparse:
        kept.append(("has the source's logits", "largest difference over their spread", gap / scale, GAP_LIMIT))
    checks = tuple(
        Check(f"the file, computed by llama.cpp's rules, {does} on {where} ({how})", value, limit, value <= limit)
        for does, how, value, limit in kept
    )
    return checks, {
        "kl": kl, "relative_gap": share, "largest_gap": gap, "spread": scale, "tokens": tokens,
        "agreement": same / tokens,
    }  # fmt: skip


def check_vocabulary(work: Work[ExportConfig], folder: Path) -> tuple[Check, ...]:
    """The file's vocabulary and template, used without any other file, against the source's tokenizer."""
    file = load_target("honeloom.backends.gguf:GgufFile")(work.dir / GGUF_NAME)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or file.need("tokenizer.ggml.model") == "no_vocab":
        return ()
    vocabulary = load_target("honeloom.backends.gguf_vocabulary:GgufVocabulary")(file)
    wrong = [text for text in TEXTS if vocabulary.encode(text) != list(tokenizer(text)["input_ids"])]
    for text in wrong[:3]:
        work.log.say(f"export: cut otherwise: {text!r}")
    checks = [
        Check(f"of {len(TEXTS)} texts, those that the file's vocabulary cuts otherwise", len(wrong), 0, not wrong)
    ]
    if tokenizer.chat_template:
        checks.append(_check_chats(file, vocabulary, tokenizer))
    return tuple(checks)


def _check_chats(file: Any, vocabulary: Any, tokenizer: Any) -> Check:
    """Conversations by the file's template and special tokens; those that the source's refuses do not count."""
    render_file = load_target("honeloom.backends.gguf_vocabulary:render_chat")
    wrong = count = 0
    for chat in CONVERSATIONS:
        text = _render(tokenizer, chat)
        if text is not None:
            count += 1
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            cut = vocabulary.encode(text, around=False, special=True)
            with bounded_rendering():
                wrong += render_file(file, chat) != text or cut != ids
    return Check(f"of {count} conversations, those that the file renders or cuts otherwise", wrong, 0, wrong == 0)


def _render(tokenizer: Any, chat: Any) -> str | None:
    """A conversation by the source's template, up to where the answer begins; None where the template refuses it."""
    try:
        with bounded_rendering():
            return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))
    except (JinjaError, TypeError, ValueError, OverflowError):
        return None
    except MemoryError:
        raise TemplateError("the chat template wants too much memory; mend or remove it in the source") from None
