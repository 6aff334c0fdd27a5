"""Scores of units: against formulas by hand, and against whole models without each unit."""

import math

import pytest
import torch
from dropping_models import FAMILIES, PARALLEL, VOCABULARY, tiny

from honeloom.backends.hf.chat import Encoded
from honeloom.backends.hf.importance import PaddedBatch, score_units
from honeloom.backends.hf.sublayers import layer_list, locate, silence, silenced
from honeloom.dropping.cosine import cosine
from honeloom.dropping.metric_config import (
    AngularConfig,
    BlockInfluenceConfig,
    CosineConfig,
    KlConfig,
    LastConfig,
    MagnitudeConfig,
    PerplexityConfig,
    RandomConfig,
    TaylorConfig,
)
from honeloom.dropping.scores import KINDS
from honeloom.errors import ConfigError, NotFiniteError, RowsError

LENGTHS = (9, 5, 14, 7, 11)
EVERY = (
    CosineConfig(), BlockInfluenceConfig(), AngularConfig(), MagnitudeConfig(), PerplexityConfig(), KlConfig(),
    TaylorConfig(), RandomConfig(), LastConfig(),
)  # fmt: skip
OUT = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def rows(*lengths, seed=0):
    """Encoded rows; the pad id 0 is a token like any other. The first third of each is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    encoded = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        scored = tuple(i >= max(1, length // 3) for i in range(length))
        encoded.append(Encoded(ids=tuple(ids), scored=scored, chars=length, truncated=False, ends=True))
    return encoded


def left_padded(encoded):
    width = max(len(e.ids) for e in encoded)
    ids, mask = torch.zeros(2, len(encoded), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, e in enumerate(encoded):
        n = len(e.ids)
        ids[i, width - n :] = torch.tensor(e.ids)
        mask[i, width - n :] = 1
        labels[i, width - n :] = torch.where(torch.tensor(e.scored), torch.tensor(e.ids), -100)
    return PaddedBatch(ids, mask, labels)


def values(scores, kind):
    return [s.value for s in scores.of(kind)]


def rank(scores, kind):
    found = values(scores, kind)
    return sorted(range(len(found)), key=lambda i: found[i])


def zero(model, layer, half):
    model.model.layers[layer].get_submodule(OUT[half]).weight.data.zero_()


# Planted zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_adds_nothing_ranks_first_and_its_removal_changes_nothing(kind):
    model = tiny("llama")
    for half in OUT if kind == "block" else [kind]:
        zero(model, 2, half)
    batch = rows(*LENGTHS)
    scores = score_units(model, None, [batch], EVERY)
    for name in ("cosine", "block_influence", "angular", "magnitude", "kl", "taylor"):
        if scores[name].of(kind):
            assert rank(scores[name], kind)[0] == 2, name
            assert abs(scores[name].of(kind)[2].value) < 1e-6, name
    assert abs(scores["perplexity"].of(kind)[2].value) < 1e-6
    ids = torch.tensor([batch[2].ids])
    before = model(input_ids=ids).logits
    silence(model, attention=[2] if kind != "mlp" else [], mlp=[2] if kind != "attention" else [])
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    "metric", [CosineConfig(), AngularConfig(), BlockInfluenceConfig(), KlConfig(), TaylorConfig()]
)
def test_windows_of_blocks_are_found_where_they_lie(metric):
    """Blocks 3 and 4 of six add nothing: of two in a row they are the least, and one alone is that of the block."""
    model = tiny("llama", num_hidden_layers=6)
    for layer in (3, 4):
        zero(model, layer, "attention"), zero(model, layer, "mlp")
    scores = score_units(model, None, [rows(*LENGTHS)], [metric], consecutive=[1, 2, 3])[metric.type]
    two = [s.value for s in scores.consecutive[2]]
    assert two.index(min(two)) == 3
    assert len(two) == 5
    assert two[3] < 1e-6
    assert scores.consecutive[1] == scores.block
    assert len(scores.consecutive[3]) == 4
    assert min(scores.consecutive[3]).value > 1e-4


# Formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_are_those_of_the_family(name):
    """Attention against m = the layer with its MLP silent, MLP against y; x is the stream for both where parallel."""
    model, batch = tiny(name), rows(12, 12)
    where = locate(model)
    got = score_units(model, where, [batch], [CosineConfig()])["cosine"]
    ids = torch.tensor([e.ids for e in batch])
    for i in (0, 2):
        before, after = layer_ends(model, where, ids, i)
        with silenced(model, mlp=[i], where=where):
            attended = layer_ends(model, where, ids, i)[1]
        with silenced(model, attention=[i], where=where):
            without_attention = layer_ends(model, where, ids, i)[1]
        assert got.block[i].value == pytest.approx(float(cosine(before, after).mean()), rel=1e-4)
        assert got.attention[i].value == pytest.approx(float(cosine(before, attended).mean()), rel=1e-4)
        pair = (before, without_attention) if name in PARALLEL else (attended, after)
        assert got.mlp[i].value == pytest.approx(float(cosine(*pair).mean()), rel=1e-4)


def layer_ends(model, where, ids, i):
    seen = {}

    def at_input(module, args, kwargs):
        seen["in"] = args[0] if args else kwargs["hidden_states"]

    layer = layer_list(model, where)[i]
    handles = [layer.register_forward_pre_hook(at_input, with_kwargs=True)]
    handles.append(layer.register_forward_hook(lambda m, a, out: seen.update(out=out)))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen["in"], seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]


def test_sandwich_norms_are_part_of_the_contribution():
    """gemma2 by hand: m = x + post(attention(pre(x))), y = m + post(mlp(pre(m)))."""
    model = tiny("gemma2")
    ids = torch.tensor([rows(12)[0].ids])
    layer = model.model.layers[1]
    x, y = layer_ends(model, locate(model), ids, 1)
    with torch.no_grad():
        seen = {}
        handle = layer.self_attn.register_forward_hook(lambda m, a, out: seen.update(a=out[0]))
        model(input_ids=ids)
        handle.remove()
        m = x + layer.post_attention_layernorm(seen["a"])
        by_hand = m + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(m)))
    assert torch.allclose(by_hand, y, atol=1e-5)
    got = score_units(model, None, [rows(12)], [CosineConfig()])["cosine"]
    assert got.attention[1].value == pytest.approx(float(cosine(x, m).mean()), rel=1e-4)
    assert got.mlp[1].value == pytest.approx(float(cosine(m, y).mean()), rel=1e-4)


def test_angles_are_read_at_the_last_token_and_averaged():
    model, batch = tiny("llama"), rows(*LENGTHS)
    got = score_units(model, None, [batch], [AngularConfig()], consecutive=[2])["angular"]
    where, angles = locate(model), []
    for e in batch:
        x = layer_ends(model, where, torch.tensor([e.ids]), 1)[0][0, -1]
        y = layer_ends(model, where, torch.tensor([e.ids]), 2)[1][0, -1]
        angles.append(math.acos(float(torch.nn.functional.cosine_similarity(x, y, dim=0))) / math.pi)
    score = got.consecutive[2][1]
    assert score.value == pytest.approx(sum(angles) / 5, rel=1e-4)
    assert score.stderr == pytest.approx(torch.tensor(angles).std().item() / 5**0.5, rel=1e-3)
    assert got.rows == got.tokens == 5


# Leave one out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt_neox", "falcon", "gptj", "opt", "gpt_oss", "gpt2"])
def test_restarted_passes_are_those_of_the_model_without_the_unit(name):
    model, batch = tiny(name), rows(*LENGTHS)
    where = locate(model)
    got = score_units(model, where, [batch[:2], batch[2:]], [PerplexityConfig(), KlConfig()], consecutive=[2])
    cases = [("attention", [1], []), ("mlp", [], [1]), ("block", [1], [1]), (2, [1, 2], [1, 2])]
    for unit, attention, mlp in cases:
        rises, divergences = [], []
        for e in batch:
            ids = torch.tensor([e.ids])
            with torch.no_grad():
                whole = model(input_ids=ids).logits[0].log_softmax(-1)
                with silenced(model, attention=attention, mlp=mlp, where=where):
                    other = model(input_ids=ids).logits[0].log_softmax(-1)
            scored = [i for i, s in enumerate(e.scored) if s]
            rises.append([float(whole[i - 1, e.ids[i]] - other[i - 1, e.ids[i]]) for i in scored])
            divergences += (whole.exp() * (whole - other)).sum(-1).tolist()
        scores = [got[m].consecutive[2] if unit == 2 else got[m].of(unit) for m in ("perplexity", "kl")]
        tokens = sum(len(r) for r in rises)
        assert scores[0][1].value == pytest.approx(sum(map(sum, rises)) / tokens, rel=1e-3, abs=1e-5)
        assert scores[1][1].value == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert got["perplexity"].tokens == tokens
    assert got["kl"].tokens == sum(LENGTHS)


def test_errors_of_leave_one_out_are_paired_by_row():
    model, batch = tiny("llama"), rows(*LENGTHS)
    score = score_units(model, None, [batch], [PerplexityConfig()])["perplexity"].attention[1]
    alone = [score_units(model, None, [[e]], [PerplexityConfig()])["perplexity"] for e in batch]
    weights = torch.tensor([float(a.tokens) for a in alone])
    rises = torch.tensor([a.attention[1].value for a in alone])
    mean = float((rises * weights).sum() / weights.sum())
    square = float((weights * (rises - mean)).square().sum()) * 5 / 4
    assert score.value == pytest.approx(mean, rel=1e-4)
    assert score.stderr == pytest.approx(square**0.5 / float(weights.sum()), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "falcon", "opt", "mixtral"])
def test_taylor_is_the_slope_of_the_loss_along_the_contribution(name):
    """d loss / d s at s = 1, where a unit adds s times what it adds: by central differences."""
    exact = name in ("gpt_neox", "falcon", "opt")  # others compute their norms in float32, whatever the weights are
    model, batch = tiny(name, scale=0.1), rows(10)
    model, step = (model.double(), 1e-5) if exact else (model, 1e-2)
    where = locate(model)
    got = score_units(model, where, [batch], [TaylorConfig()])["taylor"]
    assert not [p for p in model.parameters() if not p.requires_grad or p.grad is not None]
    ids, scored = torch.tensor([batch[0].ids]), [i for i, s in enumerate(batch[0].scored) if s]

    def loss(kind, s):
        layer, seen = layer_list(model, where)[1], {}

        def at_input(module, args, kwargs):
            seen["x"] = args[0] if args else kwargs["hidden_states"]

        def scale(module, args, out):
            y = out[0] if isinstance(out, tuple) else out
            y = seen["x"] + s * (y - seen["x"])
            return (y, *out[1:]) if isinstance(out, tuple) else y

        def scale_half(module, args, out):
            return (s * out[0], *out[1:]) if isinstance(out, tuple) else s * out

        if kind == "block":
            handles = [layer.register_forward_pre_hook(at_input, with_kwargs=True), layer.register_forward_hook(scale)]
        else:
            half = layer.get_submodule(scaled(kind, where))
            handles = [half.register_forward_hook(scale_half)]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return -sum(float(logits[i - 1, ids[0, i]]) for i in scored)

    def scaled(kind, where):
        if name == "gemma2":
            return "post_attention_layernorm" if kind == "attention" else "post_feedforward_layernorm"
        return where.of(kind)[-1]

    for kind in KINDS:
        slope = (loss(kind, 1 + step) - loss(kind, 1 - step)) / (2 * step)
        assert got.of(kind)[1].value == pytest.approx(abs(slope) / len(scored), rel=1e-4 if exact else 5e-3)


# Rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox", "gpt2"])
def scored(request):
    model, batch = tiny(request.param), rows(*LENGTHS)
    return model, batch, score_units(model, None, [batch], EVERY, consecutive=[2])


def same(one, other):
    for name, scores in one.items():
        assert scores.tokens == other[name].tokens
        assert scores.rows == other[name].rows
        lists = [(scores.of(k), other[name].of(k)) for k in KINDS]
        lists.append((scores.consecutive.get(2, ()), other[name].consecutive.get(2, ())))
        for mine, theirs in lists:
            assert [s.value for s in mine] == pytest.approx([s.value for s in theirs], rel=2e-3, abs=2e-6), name
            assert [s.stderr or 0 for s in mine] == pytest.approx([s.stderr or 0 for s in theirs], rel=5e-3, abs=2e-6)


@pytest.mark.parametrize("how", ["single", "two", "reversed", "left", "masked rows"])
def test_scores_do_not_depend_on_how_rows_are_batched(scored, how):
    model, batch, wanted = scored
    padded = PaddedBatch.of(batch, model.device)
    blank = torch.zeros(2, padded.ids.shape[1], dtype=torch.int64)
    batches = {
        "single": [[e] for e in batch],
        "two": [batch[:3], batch[3:]],
        "reversed": [batch[::-1]],
        "left": [left_padded(batch)],
        "masked rows": [
            PaddedBatch(
                torch.cat([padded.ids, blank]), torch.cat([padded.mask, blank]), torch.cat([padded.labels, blank - 100])
            )
        ],
    }[how]
    got = score_units(model, None, batches, EVERY, consecutive=[2])
    same(got, wanted)
    assert got["cosine"].ignored_rows == (2 if how == "masked rows" else 0)


def test_the_first_tokens_can_be_left_out():
    model, batch = tiny("llama"), rows(*LENGTHS)
    got = score_units(model, None, [batch], [CosineConfig(skip_first_tokens=6), KlConfig(skip_first_tokens=6)])
    left = score_units(model, None, [left_padded(batch)], [CosineConfig(skip_first_tokens=6)])["cosine"]
    assert got["cosine"].tokens == got["kl"].tokens == 3 + 8 + 1 + 5
    assert got["cosine"].rows == 4
    assert got["cosine"].ignored_rows == 1
    assert values(got["cosine"], "mlp") == pytest.approx(values(left, "mlp"), rel=1e-3)
    x, y = layer_ends(model, locate(model), torch.tensor([batch[2].ids]), 1)
    alone = score_units(model, None, [[batch[2]]], [CosineConfig(skip_first_tokens=6)])["cosine"]
    assert alone.block[1].value == pytest.approx(float(cosine(x, y)[0, 6:].mean()), rel=1e-5)
    assert alone.block[1].stderr is None


def test_the_model_is_returned_as_it_was():
    model = tiny("llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    asks = [p.requires_grad for p in model.parameters()]
    score_units(model, None, [rows(*LENGTHS)], EVERY, consecutive=[2])
    assert all(torch.equal(weights[n], p) and p.grad is None for n, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == asks
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    assert "kv_sharing_modes" not in vars(model.config)


def test_dropout_is_off():
    model = tiny("llama", attention_dropout=0.5).train()
    got = score_units(model, None, [rows(*LENGTHS)], [CosineConfig()])
    assert got == score_units(model.eval(), None, [rows(*LENGTHS)], [CosineConfig()])


def test_halves_that_are_gone_are_not_scored_and_the_rest_is_as_it_runs_now():
    model = tiny("llama")
    batch = rows(*LENGTHS)
    silence(model, attention=[1, 2], mlp=[2])
    got = score_units(model, None, [batch], EVERY, consecutive=[2])
    for name, scores in got.items():
        for kind in KINDS:
            gone = {"attention": [1, 2], "mlp": [2], "block": [2]}[kind]
            assert [i for i, s in enumerate(scores.of(kind)) if s is None] == (gone if scores.of(kind) else []), name
        assert len(scores.consecutive[2]) == 3
    cosines = got["cosine"]
    assert cosines.mlp[1].value == pytest.approx(cosines.block[1].value, rel=1e-6)
    with silenced(model, mlp=[1]):
        ids = torch.tensor([batch[0].ids])
        other = model(input_ids=ids).logits.log_softmax(-1)
    whole = model(input_ids=ids).logits.log_softmax(-1)
    alone = score_units(model, None, [[batch[0]]], [KlConfig()])["kl"]
    assert alone.mlp[1].value == pytest.approx(float((whole.exp() * (whole - other)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("metric", [CosineConfig(), AngularConfig(), PerplexityConfig(), TaylorConfig()])
def test_a_number_that_is_none_stops_and_is_named(metric):
    model = tiny("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    said = r"mlp of layer 2 .* batch 0 \(float32\)" if metric.reads == "streams" else "NaN or infinite, in batch 0"
    with pytest.raises(NotFiniteError, match=said):
        score_units(model, None, [rows(5)], [metric])


def test_the_batch_and_the_overflow_of_fp16_are_named():
    model = tiny("llama")
    where = locate(model)
    model.model.embed_tokens.weight.data[7] = 7e4
    model = model.half()
    bad = Encoded(ids=(7, 7), scored=(False, True), chars=2, truncated=False, ends=True)
    good = Encoded(ids=(5, 6), scored=(False, True), chars=2, truncated=False, ends=True)
    with pytest.raises(NotFiniteError, match=r"attention of layer 0 .* batch 1 \(float16\); fp16 overflows"):
        score_units(model, where, [[good], [bad]], [CosineConfig()])


@pytest.mark.parametrize("metric", [CosineConfig(), KlConfig(), TaylorConfig()])
def test_rows_with_numbers_that_are_none_can_be_left_out(metric):
    """The embedding of token 7 is infinite: without the rows that hold it, scores are those of the others."""
    model = tiny("llama")
    where = locate(model)
    bad = Encoded(ids=(7, 8, 9), scored=(False, True, True), chars=3, truncated=False, ends=True)
    good = [row for row in rows(5, 9, 4) if 7 not in row.ids]
    expected = score_units(model, where, [good], [metric])[metric.type]
    model.model.embed_tokens.weight.data[7] = float("inf")
    with pytest.raises(NotFiniteError, match="--on-nan skip"):
        score_units(model, where, [[*good, bad]], [metric])
    got = score_units(model, where, [[*good, bad], [bad]], [metric], skip_not_finite=True)[metric.type]
    assert (got.skipped_rows, got.rows, got.tokens) == (2, expected.rows, expected.tokens)
    for kind in KINDS:
        assert [s.value for s in got.of(kind)] == pytest.approx([s.value for s in expected.of(kind)], rel=1e-5)
    with pytest.raises(RowsError, match="of which 1 gave NaN"):
        score_units(model, where, [[bad]], [metric], skip_not_finite=True)


def test_rows_without_tokens_are_counted_and_none_left_is_refused():
    model = tiny("llama")
    empty = Encoded(ids=(), scored=(), chars=0, truncated=False, ends=False)
    got = score_units(model, None, [[empty, *rows(6)], [empty]], [CosineConfig()])["cosine"]
    assert (got.rows, got.tokens, got.ignored_rows) == (1, 6, 2)
    with pytest.raises(RowsError, match="metric cosine: no token is left"):
        score_units(model, None, [[empty]], [CosineConfig()])
    with pytest.raises(RowsError, match="metric cosine: no token is left"):
        score_units(model, None, [rows(4)], [CosineConfig(skip_first_tokens=4)])
    unscored = [Encoded(ids=(5, 6), scored=(False, False), chars=0, truncated=False, ends=False)]
    with pytest.raises(RowsError, match="metric perplexity: no scored token is left"):
        score_units(model, None, [unscored], [PerplexityConfig()])


@pytest.mark.parametrize(
    ("metrics", "consecutive", "said"),
    [
        ([CosineConfig(), CosineConfig(skip_first_tokens=1)], [], "metric cosine is given twice"),
        ([CosineConfig()], [5], "5 consecutive blocks: the model has 4 layers; give 1 to 4"),
        ([CosineConfig()], [0], "0 consecutive blocks"),
    ],
)
def test_what_cannot_be_asked_is_said(metrics, consecutive, said):
    with pytest.raises(ConfigError, match=said):
        score_units(tiny("llama"), None, [rows(4)], metrics, consecutive=consecutive)


def test_nothing_but_sums_is_kept_and_the_head_is_not_run():
    model, heads, alive = tiny("llama"), [], []
    where = locate(model)
    model.lm_head.register_forward_hook(lambda *a: heads.append(1))
    import gc

    def batches():
        for seed in range(3):
            yield rows(8, 8, seed=seed)
            gc.collect()
            alive.append(sum(o.shape == (2, 8, 32) for o in gc.get_objects() if type(o) is torch.Tensor))

    score_units(model, where, batches(), [CosineConfig(), AngularConfig(), MagnitudeConfig()], consecutive=[2])
    assert heads == []
    assert alive == [0, 0, 0]
