"""A zoo in clusters: what must agree first, what is refused, why a model stays alone, and equal bytes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from honeloom.errors import ConfigError, IncompatibleModelsError, NotFiniteError, SourceError
from honeloom.runs.log import Log, QuietConsole
from honeloom.stages.zoo_clusters import CLUSTERS_FILE, SIMILARITY_FILE, cluster_zoo, open_zoo

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


class Console(QuietConsole):
    def __init__(self):
        self.said, self.warned, self.steps, self.total = [], [], 0, None
        self.say, self.warn = self.said.append, self.warned.append

    def progress(self, label, total):
        self.total = total
        return nullcontext(self._advance)

    def _advance(self, amount):
        self.steps += amount


def make(folder, seed, noise=0.0, noise_seed=0, kind=(LlamaConfig, LlamaForCausalLM), **settings):
    """A random model, with noise on all its weights."""
    torch.manual_seed(seed)
    model = kind[1](kind[0](**{**SIZES, **settings}))
    generator = torch.Generator().manual_seed(noise_seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def tokenizer(folder, *words):
    vocabulary = {word: i for i, word in enumerate(words)}
    Tokenizer(WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A base and two tunings of it, two of another origin, one larger, one Mistral; read only."""
    root = tmp_path_factory.mktemp("zoo")
    return {
        "base": make(root / "base", 0),
        "chat": make(root / "chat", 0, 1e-3, 1),
        "code": make(root / "code", 0, 1e-3, 2),
        "other": make(root / "other", 5),
        "stranger": make(root / "stranger", 6),
        "large": make(root / "large", 0, hidden_size=64),
        "mistral": make(root / "mistral", 0, kind=(MistralConfig, MistralForCausalLM), sliding_window=None),
    }


@pytest.fixture
def cluster(tmp_path):
    """Open some folders and cluster them; the console is kept."""

    class Run:
        console = Console()

        def __call__(self, folders, base=None, **settings):
            with ExitStack() as stack:
                self.console = Console()
                opened, refused = open_zoo({n: (f, None) for n, f in folders.items()}, stack)
                origin = open_zoo({"base": (base, None)}, stack)[0]["base"] if base else None
                usual = {"method": "leader", "threshold": 0.95, "measure": "weights", "threads": 1}
                return cluster_zoo(opened, origin, **{**usual, **settings}, log=Log(self.console), refused=refused)

    return Run()


@pytest.mark.parametrize("method", ["leader", "average", "complete"])
def test_a_zoo_falls_into_families(zoo, cluster, method):
    found = cluster(zoo, method=method)
    assert found.clusters == (("base", "chat", "code"), ("large",), ("mistral",), ("other",), ("stranger",))
    assert [b.similarity.names for b in found.buckets] == [
        ("base", "chat", "code", "other", "stranger"), ("large",), ("mistral",),
    ]  # fmt: skip
    assert found.refused == ()
    assert list(found.alone) == ["large", "mistral", "other", "stranger"]
    assert "hidden_size is 32 and 64" in found.alone["large"]
    assert "model_type is 'llama' and 'mistral'" in found.alone["mistral"]
    for name in ("other", "stranger"):
        assert "similarity to its nearest family, that of " in found.alone[name]
        assert "at most the threshold 0.95" in found.alone[name]
    assert (cluster.console.steps, cluster.console.total) == (14, 14)


def test_the_order_of_the_zoo_changes_no_byte(zoo, cluster, tmp_path):
    found = [cluster(dict(pairs), method="average") for pairs in (zoo.items(), reversed(zoo.items()))]
    for number, one in enumerate(found):
        (tmp_path / f"out{number}").mkdir()
        one.write(tmp_path / f"out{number}")
    for name in (CLUSTERS_FILE, SIMILARITY_FILE):
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()


def test_the_files(zoo, cluster, tmp_path):
    found = cluster(zoo, zoo["base"], method="complete")
    found.write(tmp_path)
    written = json.loads((tmp_path / CLUSTERS_FILE).read_text())
    assert written == found.to_json()
    assert written["clusters"][0] == ["base", "chat", "code"]
    assert [written[key] for key in ("threshold", "method", "measure", "refused")] == [0.95, "complete", "weights", []]
    assert {entry["model"] for entry in written["alone"]} == set(found.alone)
    bucket = written["buckets"][0]
    assert sorted(bucket["order"]) == bucket["models"]
    assert len(bucket["linkage"]) == len(bucket["models"]) - 1
    with np.load(tmp_path / SIMILARITY_FILE, allow_pickle=False) as archive:
        names = archive["names"].tolist()
        assert names == sorted(zoo)
        assert archive["names"].dtype.kind == "U"
        assert set(archive) == {
            "names", *(f"{k}{b}" for k in ("", "delta_", "sign_") for b in ("attention", "mlp", "all")),
        }  # fmt: skip
        for key in set(archive) - {"names"}:
            square = archive[key]
            assert square.shape == (7, 7)
            assert (np.diag(square) == 1).all()
            assert np.isnan(square[names.index("large")]).sum() == 6  # between buckets nothing is known
        assert archive["all"][names.index("chat"), names.index("code")] > 0.95


@pytest.mark.slow
def test_the_same_bytes_in_another_process_with_another_number_of_threads(zoo, cluster, tmp_path):
    script = """if True:
        import sys
        from contextlib import ExitStack
        from pathlib import Path
        from honeloom.runs.log import Log, QuietConsole
        from honeloom.stages.zoo_clusters import cluster_zoo, open_zoo
        with ExitStack() as stack:
            opened, _ = open_zoo({f.name: (f, None) for f in Path(sys.argv[1]).iterdir()}, stack)
            found = cluster_zoo(opened, opened["base"], method="average", threshold=0.3, measure="deltas",
                                threads=3, log=Log(QuietConsole()))
        found.write(Path(sys.argv[2]))
    """
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    cluster(zoo, zoo["base"], method="average", threshold=0.3, measure="deltas").write(here)
    subprocess.run(
        [sys.executable, "-c", script, str(zoo["base"].parent), str(there)],
        env={**os.environ, "PYTHONHASHSEED": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    for name in (CLUSTERS_FILE, SIMILARITY_FILE):
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_deltas_tell_tunings_apart(tmp_path, cluster):
    base = make(tmp_path / "base", 0)
    # Two tunings in one direction, one in another; as weights all three are alike.
    folders = {
        "math": make(tmp_path / "math", 0, 1e-3, 1),
        "maths": make(tmp_path / "maths", 0, 1.5e-3, 1),
        "verse": make(tmp_path / "verse", 0, 1e-3, 2),
    }
    assert cluster(folders, base).clusters == (("math", "maths", "verse"),)
    found = cluster(folders, base, measure="deltas", threshold=0.5, method="average")
    assert found.clusters == (("math", "maths"), ("verse",))
    assert found.buckets[0].clusters.linkage is not None
    with pytest.raises(ConfigError, match="give base"):
        cluster(folders, measure="deltas")


def test_a_base_that_fits_only_some(zoo, cluster, tmp_path):
    twin = make(tmp_path / "twin", 0, 1e-3, 3, hidden_size=64)
    folders = {name: zoo[name] for name in ("chat", "code", "large")} | {"twin": twin}
    plain = cluster(folders, zoo["base"])
    assert plain.clusters == (("chat", "code"), ("large", "twin"))
    assert "compared by their weights alone" in cluster.console.said[0]
    assert "hidden_size" in cluster.console.said[0]
    whole = plain.similarity()
    large, other = (whole.names.index(n) for n in ("large", "twin"))
    assert math.isnan(whole.matrices["delta_all"][large, other])
    assert whole.matrices["all"][large, other] > 0.95
    deltas = cluster(folders, zoo["base"], measure="deltas", threshold=-0.9)
    assert deltas.clusters == (("chat", "code"), ("large",), ("twin",))
    assert "its delta cannot be compared" in deltas.alone["twin"]
    assert "the base base" in deltas.alone["twin"]
    assert "hidden_size" in cluster.console.warned[0]
    with pytest.raises(IncompatibleModelsError, match="a base that fits"):
        cluster({"large": zoo["large"], "twin": twin}, zoo["base"], measure="deltas")


def test_the_vocabulary_of_the_base_may_be_another(tmp_path, cluster):
    base = make(tmp_path / "base", 0)
    folders = {n: make(tmp_path / n, 0, 1e-3, i, vocab_size=65) for i, n in enumerate(("one", "two"), 1)}
    for folder in folders.values():  # the same random layers need the same weights, whatever the vocabulary
        tensors = {n: t for n, t in load_file(base / "model.safetensors").items() if "layers" in n}
        mine = load_file(folder / "model.safetensors")
        tuned = {n: tensors[n] + 0.01 * t if n in tensors else t for n, t in mine.items()}
        save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    found = cluster(folders, base, measure="deltas", threshold=0.9)
    assert found.clusters == (("one", "two"),)
    assert cluster.console.said == []


def test_tokens_must_be_the_same_and_templates_need_not(tmp_path, cluster):
    folders = {n: make(tmp_path / n, 0, 1e-3, i) for i, n in enumerate(("a", "b", "c", "d"))}
    tokenizer(folders["a"], "x", "y")
    tokenizer(folders["b"], "x", "y", "more")
    tokenizer(folders["c"], "y", "x")
    for name, template in (("a", "{{ messages[0].content }}"), ("b", "<{{ messages[0].content }}>")):
        (folders[name] / "chat_template.jinja").write_text(template)
    found = cluster(folders)
    assert found.clusters == (("a", "b", "d"), ("c",))
    assert "token id 0 is 'x' and 'y'" in found.alone["c"]


def test_tokens_must_be_the_same_in_every_pair(tmp_path, cluster):
    folders = {n: make(tmp_path / n, 0, 1e-3, i) for i, n in enumerate(("a", "b", "c"))}
    tokenizer(folders["a"], "x")
    tokenizer(folders["b"], "x", "y")
    tokenizer(folders["c"], "x", "z")  # agrees with a, and not with b
    assert cluster(folders).clusters == (("a", "b"), ("c",))


def test_a_tied_and_an_untied_model_can_be_merged(tmp_path, cluster):
    folders = {
        "tied": make(tmp_path / "tied", 0, 1e-3, 1, tie_word_embeddings=True),
        "free": make(tmp_path / "free", 0, 1e-3, 1, tie_word_embeddings=False),
    }
    (bucket,) = cluster(folders).buckets
    assert bucket.similarity.names == ("free", "tied")


def test_what_cannot_be_used_is_refused_and_the_run_goes_on(zoo, cluster, tmp_path):
    broken, quantised, pickled = (tmp_path / n for n in ("broken", "quantised", "pickled"))
    for folder in (broken, quantised, pickled):
        shutil.copytree(zoo["chat"], folder)
    (broken / "model.safetensors").write_bytes(b"\x05")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    odd, words = tmp_path / "odd", tmp_path / "words"
    for folder in (odd, words):
        shutil.copytree(zoo["chat"], folder)
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "odd"}))
    (words / "tokenizer.json").write_text("{")
    folders = {
        "absent": tmp_path / "absent", "broken": broken, "quantised": quantised, "pickled": pickled, "odd": odd,
        "words": words, "chat": zoo["chat"], "code": zoo["code"],
    }  # fmt: skip
    found = cluster(folders)
    assert found.clusters == (("chat", "code"),)
    reasons = dict(found.refused)
    assert sorted(reasons) == ["absent", "broken", "odd", "pickled", "quantised", "words"]
    for name, words_ in (
        ("absent", "no model.safetensors"), ("quantised", "gptq"), ("pickled", "pickled weights"), ("odd", "odd"),
        ("words", "tokenizer.json"),
    ):  # fmt: skip
        assert words_ in reasons[name]
    with pytest.raises(SourceError, match=r"no model of the zoo can be used; broken"):
        cluster({"broken": broken})
    with pytest.raises(SourceError, match="holds no model"):
        cluster({})


def test_a_model_that_holds_nan_is_refused_after_it_was_read(zoo, cluster, tmp_path):
    damaged = shutil.copytree(zoo["chat"], tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    found = cluster({"code": zoo["code"], "damaged": damaged, "chat": zoo["chat"]}, zoo["base"])
    assert found.clusters == (("chat", "code"),)
    ((name, reason),) = found.refused
    assert name == "damaged"
    assert "up_proj" in reason
    with pytest.raises(NotFiniteError, match="base"):
        cluster({"code": zoo["code"], "chat": zoo["chat"]}, damaged)


def test_a_model_that_is_there_twice_counts_once(zoo, cluster, tmp_path):
    copy = shutil.copytree(zoo["chat"], tmp_path / "copy")
    almost = shutil.copytree(zoo["chat"], tmp_path / "almost")
    tensors = load_file(almost / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1e-6
    save_file(tensors, almost / "model.safetensors", metadata={"format": "pt"})
    found = cluster({"copy": copy, "chat": zoo["chat"], "almost": almost, "code": zoo["code"]})
    assert found.clusters == (("almost", "chat", "code"),)
    assert found.refused == (("copy", "it has the same weights as chat"),)
    assert cluster.console.said == ["clusters: copy is left out: it has the same weights as chat"]


def test_a_single_model(zoo, cluster):
    found = cluster({"chat": zoo["chat"]}, measure="deltas", base=zoo["base"])
    assert found.clusters == (("chat",),)
    assert found.alone == {"chat": "it is the only model"}
    assert found.similarity().matrices["delta_all"].tolist() == [[1.0]]


def test_real_models_of_one_architecture(stories260k, cluster, tmp_path):
    near = shutil.copytree(stories260k, tmp_path / "near")
    tensors = load_file(near / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    changed = {n: (t + 1e-3 * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in tensors.items()}
    save_file(changed, near / "model.safetensors", metadata={"format": "pt"})
    far = shutil.copytree(stories260k, tmp_path / "far")
    noise = {n: (t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in tensors.items()}
    save_file(noise, far / "model.safetensors", metadata={"format": "pt"})
    found = cluster({"far": far, "near": near, "stories": stories260k})
    assert found.clusters == (("near", "stories"), ("far",))
