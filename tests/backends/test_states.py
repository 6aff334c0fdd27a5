"""The residual stream: what the hooks show is what the layers do."""

import numpy as np
import pytest
import torch

from honeloom import lab
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import load_model, load_tokenizer
from honeloom.backends.hf.score import pad_batch
from honeloom.backends.hf.states import Reached, RunningMeans, mean_states, watched
from honeloom.backends.hf.sublayers import locate, silenced
from honeloom.checkpoint.architectures import architecture_of
from honeloom.testing.fakes import chat_row


@pytest.fixture(scope="module")
def world():
    model = load_model(lab.base_path())
    encoder = Encoder(load_tokenizer(lab.base_path()), 64)
    encoded = [encoder.encode(chat_row(f"r{i}", f"Add {i} and 3. " * (i + 1), "5")) for i in range(3)]
    return model, architecture_of(model.config.to_dict()), encoded


def watch(model, encoded, observe, where=None, **kwargs):
    ids, mask, _ = pad_batch(encoded, model.device)
    with watched(model, where or locate(model), observe), torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)


def test_watched_streams_are_the_layers_own(world):
    model, _, encoded = world
    seen = {}
    out = watch(
        model, encoded, lambda k, i, a, b: seen.__setitem__((k, i), (a.clone(), b.clone())), output_hidden_states=True
    )
    layers = model.config.num_hidden_layers
    assert len(seen) == 3 * layers
    for i in range(layers):
        before, after = seen["block", i]
        assert torch.equal(before, out.hidden_states[i])
        assert torch.equal(seen["attention", i][1], seen["mlp", i][0])
        if i + 1 < layers:  # transformers reports the last state after the final norm
            assert torch.equal(after, out.hidden_states[i + 1])


def test_silent_halves_are_not_shown_and_the_block_is(world):
    model, _, encoded = world
    seen = {}
    with silenced(model, attention=[2, 5], mlp=[4, 5]) as where:
        watch(model, encoded, lambda k, i, a, b: seen.__setitem__((k, i), bool(torch.equal(a, b))), where)
    assert [key for key, same in seen.items() if same] == [("block", 5)]
    assert {("attention", 2), ("attention", 5), ("mlp", 4), ("mlp", 5)}.isdisjoint(seen)
    assert len(seen) == 3 * model.config.num_hidden_layers - 4


def test_a_pass_can_end_behind_the_last_layer(world):
    model, _, encoded = world
    ids, _, _ = pad_batch(encoded, model.device)
    where, seen, heads = locate(model), [], []
    handle = model.lm_head.register_forward_hook(lambda *a: heads.append(1))
    with watched(model, where, lambda k, i, a, b: seen.append((k, i)), stop=True), pytest.raises(Reached):
        model(input_ids=ids)
    handle.remove()
    assert seen[-1] == ("block", model.config.num_hidden_layers - 1)
    assert heads == []


def test_hooks_are_gone_afterwards(world):
    model, _, encoded = world

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    watch(model, encoded, lambda *a: None)
    assert hooks() == before


@pytest.mark.parametrize("layer", [-1, 0, 7])
def test_mean_states_do_not_depend_on_padding(world, layer):
    model, architecture, encoded = world
    together = next(iter(mean_states(model, architecture, [encoded], layer)))
    for i, one in enumerate(encoded):
        alone = next(iter(mean_states(model, architecture, [[one]], layer)))
        assert torch.allclose(together[i], alone[0], atol=1e-5)


def test_running_means_are_weighted_by_tokens_with_rows_as_units():
    mean = RunningMeans(2)
    mean.add(np.array([[2.0, 9.0, 0.0], [1.0, 0.0, 0.0]]), np.array([[1.0, 3.0, 0.0], [4.0, 0.0, 0.0]]))
    assert mean.means.tolist() == [11 / 4, 1 / 4]
    assert mean.rows.tolist() == [2, 1]
    assert mean.tokens.tolist() == [4, 4]
    assert mean.stderr(1) is None
    sums = np.random.default_rng(0).random((1, 50))
    many = RunningMeans(1)
    for part in np.split(sums, [7, 20], axis=1):
        many.add(part, np.full(part.shape, 4.0))
    assert many.stderr(0) == pytest.approx((sums / 4).std(ddof=1) / 50**0.5, rel=1e-6)
