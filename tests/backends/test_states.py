"""The residual stream: what the hooks show is what the layers do."""

import pytest
import torch

from honeloom import lab
from honeloom.backends.hf.chat import Encoder
from honeloom.backends.hf.load import load_model, load_tokenizer
from honeloom.backends.hf.score import pad_batch
from honeloom.backends.hf.states import RunningMean, mean_states, skip_sublayers, watch_sublayers
from honeloom.checkpoint.architectures import architecture_of
from honeloom.testing.fakes import chat_row


@pytest.fixture(scope="module")
def world():
    model = load_model(lab.base_path())
    encoder = Encoder(load_tokenizer(lab.base_path()), 64)
    encoded = [encoder.encode(chat_row(f"r{i}", f"Add {i} and 3. " * (i + 1), "5")) for i in range(3)]
    return model, architecture_of(model.config.to_dict()), encoded


def test_watched_streams_are_the_layers_own(world):
    model, architecture, encoded = world
    seen = {}
    for _ in watch_sublayers(
        model, architecture, [encoded], lambda k, i, a, b: seen.__setitem__((k, i), (a.clone(), b.clone()))
    ):
        pass
    ids, mask, _ = pad_batch(encoded, model.device)
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    layers = model.config.num_hidden_layers
    assert len(seen) == 3 * layers
    for i in range(layers):
        before, after = seen["block", i]
        assert torch.equal(before, states[i])
        assert torch.equal(seen["attention", i][1], seen["mlp", i][0])
        if i + 1 < layers:  # transformers reports the last state after the final norm
            assert torch.equal(after, states[i + 1])


def test_skipped_sublayers_add_nothing(world):
    model, architecture, encoded = world
    seen = {}

    def look(kind, i, a, b):
        seen[kind, i] = bool(torch.equal(a, b))

    with skip_sublayers(model, architecture, attention=[2], mlp=[4]):
        for _ in watch_sublayers(model, architecture, [encoded], look):
            pass
    assert [k for k, same in sorted(seen.items()) if same] == [("attention", 2), ("mlp", 4)]


def test_hooks_are_gone_afterwards(world):
    model, architecture, encoded = world

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    list(watch_sublayers(model, architecture, [encoded], lambda *a: None))
    assert hooks() == before


@pytest.mark.parametrize("layer", [-1, 0, 7])
def test_mean_states_do_not_depend_on_padding(world, layer):
    model, architecture, encoded = world
    together = next(iter(mean_states(model, architecture, [encoded], layer)))
    for i, one in enumerate(encoded):
        alone = next(iter(mean_states(model, architecture, [[one]], layer)))
        assert torch.allclose(together[i], alone[0], atol=1e-5)


def test_running_mean_is_weighted_by_tokens_with_rows_as_units():
    mean = RunningMean()
    mean.add(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 3.0]))
    assert mean.mean == 11 / 4
    assert RunningMean([3.0], [1.0]).stderr is None
    sums, counts = torch.rand(50), torch.full((50,), 4.0)
    many = RunningMean()
    many.add(sums, counts)
    assert many.stderr == pytest.approx(float((sums / 4).double().std() / 50**0.5), rel=1e-6)
