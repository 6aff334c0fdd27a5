"""Halves of layers taken out of stock models of many families: proof, caches, restoration."""

import pytest
import torch
from dropping_models import FAMILIES, LAYER_TYPES, PARALLEL, VOCABULARY, tiny
from transformers import DynamicCache, StaticCache

from honeloom.backends.hf import sublayers
from honeloom.backends.hf.dropped_model import NoAttention
from honeloom.backends.hf.sublayers import layer_list, locate, silence, silenced
from honeloom.checkpoint.architectures import ARCHITECTURES
from honeloom.dropping.export.halves import norms_of
from honeloom.errors import CheckpointError

TOKENS = 24
CHUNKS = (10, 8, 6)
CLOSE = 2e-5
LAYERS = 4
PROMPT = 18
STEPS = (PROMPT, *[1] * (TOKENS - PROMPT))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


def drops(name):
    """Layer 0, the first of every kind of layer, the last, several."""
    kinds = LAYER_TYPES.get(name, ["full_attention"] * LAYERS)
    firsts = sorted({kinds.index(kind) for kind in kinds})
    return [[0], *[[i] for i in firsts if i], [LAYERS - 1], [0, 1], [1, 2]]


def zeroed(model, where, attention, mlp):
    """Hooks by which halves return zeros: the reference, with every module in its place."""

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    layers = layer_list(model, where)
    modules = [layers[i].get_submodule(where.attention[-1]) for i in attention]
    modules += [layers[i].get_submodule(where.mlp[-1]) for i in mlp]
    return [module.register_forward_hook(zero) for module in modules]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_halves_is_the_model_whose_halves_return_zeros(name, ids):
    model = tiny(name)
    where = locate(model)
    assert (where.mid_stream is None) == (name in PARALLEL)
    whole = logits(model, ids)
    for attention, mlp in (([0], []), ([], [0]), ([3], [3]), ([0, 2], [1, 2])):
        handles = zeroed(model, where, attention, mlp)
        wanted = logits(model, ids)
        for handle in handles:
            handle.remove()
        with silenced(model, attention=attention, mlp=mlp, where=where):
            assert torch.equal(logits(model, ids), wanted)
    assert torch.equal(logits(model, ids), whole)
    assert not torch.equal(wanted, whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_with_a_cache_gives_the_logits_without_one(name, ids):
    model = tiny(name)
    where = locate(model)
    for attention in drops(name):
        with silenced(model, attention=attention, where=where):
            wanted = logits(model, ids, use_cache=False)
            close = CLOSE * float(wanted.abs().max())
            for chunks in (STEPS, CHUNKS):
                assert gap(in_chunks(model, ids, chunks, None), wanted) < close, (attention, chunks)
            static = StaticCache(config=model.config.get_text_config(), max_cache_len=TOKENS + 8)
            assert gap(in_chunks(model, ids, STEPS, static), wanted) < close, attention
            assert gap(left_padded(model, ids), wanted[:, : TOKENS - 6]) < close, attention


def gap(one, other):
    return float((one - other).abs().max())


def in_chunks(model, ids, chunks, cache):
    parts, start = [], 0
    for size in chunks:
        with torch.inference_mode():
            out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
        start += size
    return torch.cat(parts, dim=1)


def left_padded(model, ids):
    """Logits of a row's tokens behind padding of 6, beside a row of other tokens; the prompt, then token by token."""
    pad = 6
    other = (ids + 1) % VOCABULARY
    batch = torch.cat([torch.cat([torch.zeros_like(ids[:, :pad]), ids[:, :-pad]], dim=1), other])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache, parts, start = None, [], 0
    for stop in range(PROMPT, TOKENS + 1):
        with torch.inference_mode():
            out = model(
                input_ids=batch[:, start:stop], attention_mask=mask[:, :stop], position_ids=places[:, start:stop],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        cache, start = out.past_key_values, stop
        parts.append(out.logits)
    return torch.cat(parts, dim=1)[:1, pad:]


def test_the_test_of_caches_sees_a_cache_that_was_not_told(monkeypatch, ids):
    model = tiny("llama")
    monkeypatch.setattr(sublayers, "_fit_cache", lambda *args: lambda: None)
    with silenced(model, attention=[0]):
        wanted = logits(model, ids, use_cache=False)
        assert gap(in_chunks(model, ids, STEPS, None), wanted) > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "olmo2"])
def test_beam_search_finds_the_same_with_and_without_a_cache(name, ids):
    model = tiny(name)
    prompts = torch.stack([ids[0, :12], torch.cat([torch.zeros(4, dtype=torch.int64), ids[0, 4:12]])])
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    with silenced(model, attention=[0, 2]):
        runs = [
            model.generate(
                prompts, attention_mask=mask, num_beams=3, max_new_tokens=8, do_sample=False, use_cache=cached,
                return_dict_in_generate=True, output_scores=True,
            )
            for cached in (True, False)
        ]  # fmt: skip
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert torch.allclose(runs[0].sequences_scores, runs[1].sequences_scores, atol=1e-4)


def test_layers_without_attention_have_no_place_in_the_cache(ids):
    model = tiny("llama")
    silence(model, attention=[0, 2])
    cache = model(input_ids=ids, use_cache=True).past_key_values
    stored = [layer.keys for layer in cache.layers]
    assert [keys is None for keys in stored] == [True, False, True, False]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    assert size == 2 * 2 * 8 * 4 * TOKENS * (LAYERS - 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attentions_of_one_kind_are_numbered_anew_where_caches_keep_no_placeholders(name, monkeypatch, ids):
    monkeypatch.setattr(sublayers, "keeps_placeholders", lambda config, missing: False)
    model = tiny(name)
    whole = logits(model, ids)
    for attention in ([0], [0, 2], [3]):
        with silenced(model, attention=attention):
            wanted = logits(model, ids, use_cache=False)
            close = CLOSE * float(wanted.abs().max())
            for cache in (None, DynamicCache()):
                assert gap(in_chunks(model, ids, STEPS, cache), wanted) < close
            assert gap(left_padded(model, ids), wanted[:, : TOKENS - 6]) < close
    assert "kv_sharing_modes" not in vars(model.config)
    assert gap(in_chunks(model, ids, STEPS, None), whole) < CLOSE * float(whole.abs().max())


def test_mixed_kinds_without_placeholders_are_refused(monkeypatch):
    monkeypatch.setattr(sublayers, "keeps_placeholders", lambda config, missing: False)
    model = tiny("gemma2")
    with pytest.raises(CheckpointError, match=r"several kinds \(full_attention, sliding_attention\)"):
        silence(model, attention=[0])
    assert locate(model).without_attention == ()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bloom", {"n_layer": 4, "n_head": 4}),
        ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
def test_layers_that_are_no_sum_are_refused_with_the_error_measured(name, settings):
    with pytest.raises(
        CheckpointError, match=r"layer 0 of this .* silenced it must return its input, and it is off by"
    ):
        locate(tiny(name, **settings))


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(CheckpointError, match="encoder-decoder"):
        locate(T5ForConditionalGeneration(config))


def test_layers_without_attention_by_any_known_name_are_refused():
    with pytest.raises(CheckpointError, match=r"no lists of 2 layers that all have an attention \(self_attn, "):
        locate(tiny("mamba", num_hidden_layers=2))


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n in FAMILIES])
def test_the_norms_that_go_are_those_of_the_table(name):
    model, architecture = tiny(name), ARCHITECTURES[name]
    where = locate(model)
    assert where.mid_stream == architecture.mid_stream
    children = dict(layer_list(model, where)[0].named_children())
    for half in ("attention", "mlp"):
        assert where.norms(half) == tuple(n for n in norms_of(architecture, half) if n in children)


def test_silence_takes_the_parameters_and_composes(ids):
    model = tiny("llama")
    size = {half: count(model.model.layers[0], half) for half in ("self_attn", "mlp")}
    whole = sum(p.numel() for p in model.parameters())
    where = silence(model, attention=[1])
    again = silence(model, attention=[0, 1], mlp=[1], where=where)
    assert (again.without_attention, again.without_mlp) == ((0, 1), (1,))
    assert locate(model) == again
    gone = whole - sum(p.numel() for p in model.parameters())
    assert gone == 2 * (size["self_attn"] + 32) + size["mlp"] + 32
    assert not [n for n in model.state_dict() if "layers.1." in n]
    other = tiny("llama")
    with silenced(other, attention=[0, 1], mlp=[1]):
        assert torch.equal(logits(model, ids), logits(other, ids))


def count(layer, half):
    return sum(p.numel() for p in layer.get_submodule(half).parameters())


def test_silenced_puts_everything_back(ids):
    model = tiny("gemma2")
    before = dict(model.state_dict())
    modules, config = dict(model.named_modules()), model.config.to_dict()

    def stop():
        with silenced(model, attention=[0, 3], mlp=[3]):
            assert isinstance(model.model.layers[3].self_attn, NoAttention)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not model.training


def test_adapters_do_not_hide_the_layers(ids):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"])).eval()
    with silenced(wrapped, attention=[1], mlp=[2]):
        got = logits(wrapped, ids)
    with silenced(tiny("llama"), attention=[1], mlp=[2]) as where:
        assert where.without_mlp == (2,)
    plain = tiny("llama")
    silence(plain, attention=[1], mlp=[2])
    assert torch.equal(got, logits(plain, ids))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention": [4]}, "layer 4 is to lose a half, and the model has layers 0 to 3"),
        ({"mlp": [-1]}, "layer -1 is to lose"),
        ({"attention": [0, 1, 2, 3]}, "all 4 attentions would be gone, and at least 1 must remain"),
    ],
)
def test_what_cannot_be_dropped_is_said(given, said):
    with pytest.raises(CheckpointError, match=said):
        silence(tiny("llama"), **given)
