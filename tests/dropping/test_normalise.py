"""A drop set as the fewest blocks, and the stock model that it is where all of them are whole."""

import copy
from itertools import pairwise, product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from honeloom.dropping.normalise import is_native, normalise


def halves(blocks):
    """The sequence of halves that blocks stand for."""
    return [half for a, m in blocks for half in (("A", a), ("M", m)) if half[1] is not None]


def test_pairs_that_drops_broke_are_made_anew():
    assert normalise(4, [2], [1]) == ((0, 0), (1, 2), (3, 3))
    assert normalise(4, [1], [1]) == ((0, 0), (2, 2), (3, 3))
    assert normalise(3, [0], []) == ((None, 0), (1, 1), (2, 2))
    assert normalise(3, [], [1]) == ((0, 0), (1, None), (2, 2))
    assert normalise(5, [1, 2, 3], [0]) == ((0, 1), (None, 2), (None, 3), (4, 4))
    assert normalise(2, [0, 1], [0, 1]) == ()


def test_what_survives_keeps_its_order_in_the_fewest_blocks():
    """Over every drop set of four layers: no half is lost or moved, and no two neighbours could be one block."""
    for bits in product((0, 1), repeat=8):
        gone = [[i for i in range(4) if bits[2 * i + k]] for k in (0, 1)]
        blocks = normalise(4, *gone)
        survivors = [h for i in range(4) for k, h in enumerate((("A", i), ("M", i))) if i not in gone[k]]
        assert halves(blocks) == survivors
        assert all(block != (None, None) for block in blocks)
        assert not any(one[1] is None and two[0] is None for one, two in pairwise(blocks))
        alternates = [kind for kind, _ in survivors] == ["A", "M"] * (len(survivors) // 2) and len(survivors) > 0
        assert is_native(blocks) == alternates


def test_an_index_that_is_no_layer_is_named():
    with pytest.raises(ValueError, match=r"layer 4 is dropped, and the model has layers 0 to 3"):
        normalise(4, [4], [])


@pytest.mark.parametrize(("attention", "mlp"), [([2], [1]), ([1], [1]), ([2, 3], [1, 3])], ids=str)
def test_a_native_set_is_the_stock_model_of_fewer_layers(attention, mlp):
    """Bit for bit: modules of a smaller Llama, taken from where the blocks say."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    source = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=5, initializer_range=0.3)).eval()
    blocks = normalise(5, attention, mlp)
    small = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=len(blocks))).eval()
    small.model.embed_tokens, small.model.norm, small.lm_head = (
        source.model.embed_tokens, source.model.norm, source.lm_head,
    )  # fmt: skip
    for layer, (a, m) in zip(small.model.layers, blocks, strict=True):
        layer.load_state_dict(
            {
                **{
                    k: v
                    for k, v in source.model.layers[a].state_dict().items()
                    if k.startswith(("self_attn", "input_"))
                },
                **{k: v for k, v in source.model.layers[m].state_dict().items() if k.startswith(("mlp", "post_"))},
            }
        )
    silent = copy.deepcopy(source)
    for i in attention:
        torch.nn.init.zeros_(silent.model.layers[i].self_attn.o_proj.weight)
    for i in mlp:
        torch.nn.init.zeros_(silent.model.layers[i].mlp.down_proj.weight)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(small(ids).logits, silent(ids).logits)
        assert not torch.equal(small(ids).logits, source(ids).logits)
