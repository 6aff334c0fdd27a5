"""Run by a Python that has llama-cpp-python: logits of one row of token ids, and how it cuts a text.

python llama_cpp_logits.py MODEL.gguf REQUEST.json ANSWER.json
"""

import json
import sys
from pathlib import Path

import llama_cpp


def main(model: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    common = {"n_ctx": 256, "n_batch": 64, "n_threads": 1, "n_gpu_layers": 0, "use_mmap": False, "verbose": False}
    everywhere = llama_cpp.Llama(model, logits_all=True, flash_attn=True, **common)
    everywhere.eval(asked["ids"])
    found = {"all": everywhere.scores[: len(asked["ids"])].tolist()}
    last = llama_cpp.Llama(model, logits_all=False, **common)  # another path through the last layer
    last.eval(asked["ids"])
    size = last.n_vocab()
    pointer = llama_cpp.llama_get_logits_ith(last._ctx.ctx, -1)
    found["last"] = [pointer[i] for i in range(size)]
    found["state_bytes"] = int(llama_cpp.llama_state_get_size(last._ctx.ctx))
    found["tokens"] = [last.tokenize(text.encode(), add_bos=True, special=False) for text in asked.get("texts", [])]
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
