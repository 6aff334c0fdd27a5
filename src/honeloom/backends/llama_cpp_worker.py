"""Run by a Python that has llama.cpp, and need not have honeloom: what llama.cpp makes of a GGUF file.

python llama_cpp_worker.py MODEL.gguf REQUEST.json ANSWER.npz

llama.cpp comes as the package llama_cpp (llama-cpp-python, compiled where it is installed) or cyllama (wheels).

REQUEST: {"rows": [[id]], "last": [[id]], "texts": [text], "prompts": [[id]], "tokens": N, "chat": [message]}.
ANSWER: `all`, logits of all positions of the rows, one after the other (T, V); `last`, those of the last position of
each row of "last" alone, which take another path through the last layer (N, V); `greedy`, N tokens after each prompt;
and `said`, JSON with the tokens of the texts, the rendered chat, the bytes of the state and the version.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

BATCH = 64


class LlamaCppPython:
    """A context of the package llama_cpp."""

    def __init__(self, model: str, size: int, *, everywhere: bool) -> None:
        import llama_cpp

        self._library = llama_cpp.llama_cpp
        defaults = self._library.llama_model_default_params

        def plain() -> Any:  # weights as the file has them: repacked ones are for speed, and may not fit the host
            params = defaults()
            params.use_extra_bufts = False
            return params

        self._library.llama_model_default_params = plain
        self._llama = llama_cpp.Llama(
            model, n_ctx=size, n_batch=BATCH, n_threads=1, n_gpu_layers=0, use_mmap=False, flash_attn=True,
            verbose=False, logits_all=everywhere,
        )  # fmt: skip
        self._library.llama_model_default_params = defaults
        self.metadata = dict(self._llama.metadata)
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def read(self, ids: list[int], *, anew: bool) -> None:
        """Compute token ids behind what was read, or anew."""
        if anew:
            self._llama.reset()
        self._llama.eval(ids)

    def last(self) -> Any:
        """Logits (V,) of the last position."""
        pointer = self._library.llama_get_logits_ith(self._llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),)).copy()

    def everywhere(self, ids: list[int]) -> Any:
        """Logits (T, V) of a row."""
        self.read(ids, anew=True)
        return np.array(self._llama.scores[: len(ids)], dtype=np.float32)

    def cut(self, text: str) -> list[int]:
        """Token ids of a text, with those that go around it."""
        return list(self._llama.tokenize(text.encode(), add_bos=True, special=False))

    def word(self, token: int) -> str:
        """The text of a token."""
        return str(self._llama._model.token_get_text(token))

    def state_bytes(self) -> int:
        """Of the context, keys and values included."""
        return int(self._library.llama_state_get_size(self._llama._ctx.ctx))


class Cyllama:
    """A context of the package cyllama."""

    def __init__(self, model: str, size: int, *, everywhere: bool) -> None:
        from cyllama.llama import llama_cpp as library

        class Model(library.LlamaModel):  # type: ignore[misc]
            @property
            def n_vocab(self) -> int:  # its context asks the model for this, and 0.2.18's has it not
                return int(self.get_vocab().n_vocab)

        library.disable_logging()
        weights, context = library.LlamaModelParams(), library.LlamaContextParams()
        weights.use_mmap, weights.use_extra_bufts, weights.n_gpu_layers = False, False, 0
        context.n_ctx, context.n_batch, context.n_ubatch = size, max(size, BATCH), BATCH
        context.n_threads = context.n_threads_batch = context.flash_attn_type = 1
        self._model = Model(path_model=model, params=weights, verbose=False)
        self._context = library.LlamaContext(model=self._model, params=context, verbose=False)
        self._vocabulary = self._model.get_vocab()
        self._batch = library.LlamaBatch(n_tokens=max(size, BATCH), embd=0, n_seq_max=1)
        self._place = 0
        self.metadata = dict(self._model.metadata())
        self.version = f"cyllama {importlib.metadata.version('cyllama')}"

    def read(self, ids: list[int], *, anew: bool, everywhere: bool = False) -> None:
        """Compute token ids behind what was read, or anew."""
        if anew:
            self._context.kv_cache_clear(True)
            self._place = 0
        self._batch.reset()
        for i, token in enumerate(ids):
            self._batch.add(token, self._place + i, [0], everywhere or i == len(ids) - 1)
        self._context.decode(self._batch)
        self._place += len(ids)

    def last(self) -> Any:
        """Logits (V,) of the last position."""
        return np.array(self._context.get_logits_ith(-1), dtype=np.float32)

    def everywhere(self, ids: list[int]) -> Any:
        """Logits (T, V) of a row."""
        self.read(ids, anew=True, everywhere=True)
        return np.array([self._context.get_logits_ith(i) for i in range(len(ids))], dtype=np.float32)

    def cut(self, text: str) -> list[int]:
        """Token ids of a text, with those that go around it."""
        return list(self._vocabulary.tokenize(text, True, False))

    def word(self, token: int) -> str:
        """The text of a token."""
        return str(self._vocabulary.get_text(token))

    def state_bytes(self) -> int:
        """Of the context, keys and values included."""
        return int(self._context.get_state_size())


def _continue(llama: Any, prompt: list[int], count: int) -> list[int]:
    found: list[int] = []
    llama.read(prompt, anew=True)
    for _ in range(count):
        found.append(int(llama.last().argmax()))
        llama.read(found[-1:], anew=False)
    return found


def _last(llama: Any, ids: list[int]) -> Any:
    llama.read(ids, anew=True)
    return llama.last()


class _Generation(Extension):
    """Marks around what an assistant says, which print nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Take what is between them."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _render(llama: Any, chat: list[dict[str, str]]) -> Any:
    """The chat by the file's template and special tokens; None without a template."""
    template = llama.metadata.get("tokenizer.chat_template")
    if not template or not chat:
        return None
    ids = {name: llama.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    words = {f"{name}_token": "" if i is None else llama.word(int(i)) for name, i in ids.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation])
    compiled = environment.from_string(template)
    return compiled.render(messages=chat, add_generation_prompt=True, raise_exception=_refuse, **words)


def main(model: str, request: str, answer: str) -> None:
    """Answer one request."""
    kind = LlamaCppPython if importlib.util.find_spec("llama_cpp") else Cyllama
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    rows, prompts, count = asked.get("rows", []), asked.get("prompts", []), asked.get("tokens", 0)
    size = max(len(row) for row in [*rows, *asked.get("last", []), [0] * 8])
    found: dict[str, Any] = {}
    if rows:
        llama = kind(model, size, everywhere=True)
        found["all"] = np.concatenate([llama.everywhere(row) for row in rows])
        del llama
    llama = kind(model, max([size, *(len(p) + count for p in prompts)]), everywhere=False)
    if asked.get("last"):
        found["last"] = np.stack([_last(llama, row) for row in asked["last"]])
    if prompts:
        found["greedy"] = np.array([_continue(llama, p, count) for p in prompts])
    said = {
        "tokens": [llama.cut(text) for text in asked.get("texts", [])],
        "chat": _render(llama, asked.get("chat", [])),
        "state_bytes": llama.state_bytes(),
        "version": llama.version,
    }
    np.savez(answer, said=np.array(json.dumps(said)), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
