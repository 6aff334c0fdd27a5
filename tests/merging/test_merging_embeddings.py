"""Rows of embeddings and heads in the order of one vocabulary."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from honeloom.checkpoint.vocabulary import Vocabulary
from honeloom.errors import ConfigError, IncompatibleModelsError
from honeloom.merging.engine.embeddings import RowReader, combine, lay_out, permuted
from honeloom.merging.engine.tensors import Read, Rule, Tensors
from honeloom.merging.linear import linear
from honeloom.merging.merge_config import TokenRule
from honeloom.merging.slerp import slerp
from honeloom.merging.task_vectors import task_arithmetic, ties


def vocabulary(*tokens: str, **roles: str) -> Vocabulary:
    """Tokens with their place as id; those that begin with < are added."""
    added = {t: {"special": True} for t in tokens if t.startswith("<")}
    digest = "|".join(tokens) + str(sorted(roles.items()))
    return Vocabulary("BPE", {t: i for i, t in enumerate(tokens)}, added, roles, {}, digest, frozenset(tokens))


class Counted:
    """A tensor in memory as a reader, with what was read of it."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.flat, self.ranges = rows.reshape(-1), []
        self.reader = RowReader(self._read, rows.shape[0], rows[0].numel())

    def _read(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start <= stop <= self.flat.numel()
        self.ranges.append((start, stop))
        return self.flat[start:stop].double()


def matrices(reads: Sequence[Read], rows: int, width: int) -> list[torch.Tensor]:
    return [read(0, rows * width).view(rows, width) for read in reads]


def filled(plan, tensors, rules=None) -> list[torch.Tensor]:
    """Every model's matrix in the order of the plan."""
    reads = permuted([Counted(t).reader for t in tensors], lay_out(plan, rules))
    return matrices(reads, plan.rows, tensors[0][0].numel())


def merged(rule: Rule, reads: Sequence[Read], shape, base: Read | None = None, **settings) -> torch.Tensor:
    group = Tensors("embed", tuple(shape), tuple(reads), (1.0,) * len(reads), base)
    return rule.plan(group, **settings)(0, group.count).view(shape)


AB, BC = vocabulary("a", "b"), vocabulary("b", "c")
ONE, TWO = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[5.0, 9.0], [7.0, 8.0]])


def test_golden_23_a_union_keeps_lone_rows_and_merges_shared_ones():
    plan = combine({"one": AB, "two": BC}, "one", "union")
    assert dict(plan.tokens) == {"a": 0, "b": 1, "c": 2}
    assert {n: p.tolist() for n, p in plan.permutations.items()} == {"one": [0, 1, -1], "two": [-1, 0, 1]}
    reads = permuted([Counted(ONE).reader, Counted(TWO).reader], lay_out(plan))
    expected = [[1.0, 2.0], [4.0, 7.0], [7.0, 8.0]]  # a copied, b the mean, c copied
    assert merged(linear, reads, (3, 2)).tolist() == expected
    # With task vectors a row that only one side has is a row that nobody changed.
    result = merged(task_arithmetic, reads[1:], (3, 2), reads[0], scale=1.0)
    assert result.tolist() == [[1.0, 2.0], [5.0, 9.0], [7.0, 8.0]]


def test_golden_23_new_padding_is_the_mean_of_the_rows():
    plan = combine({"one": AB, "two": BC}, "one", "union", pad_to_multiple_of=5)
    assert (plan.known, plan.rows) == (3, 5)
    reads = permuted([Counted(ONE).reader, Counted(TWO).reader], lay_out(plan))
    result = merged(linear, reads, (5, 2))
    assert result[:3].tolist() == [[1.0, 2.0], [4.0, 7.0], [7.0, 8.0]]
    torch.testing.assert_close(result[3:], result[:3].mean(0).expand(2, 2), rtol=1e-15, atol=0)


def test_golden_23_the_same_vocabulary_in_another_order_is_permute_then_merge():
    tokens = [f"t{i}" for i in range(97)]
    order = np.random.default_rng(0).permutation(97)
    first, other = vocabulary(*tokens), vocabulary(*(tokens[i] for i in order))
    torch.manual_seed(0)
    base, one, two = (torch.randn(97, 24) for _ in range(3))
    shuffled = two[torch.from_numpy(order)]
    plan = combine({"base": first, "one": first, "two": other}, "base")
    reads = permuted([Counted(t).reader for t in (base, one, shuffled)], lay_out(plan))
    cases = ((linear, None, {}), (slerp, None, {"t": 0.3}), (task_arithmetic, base, {"scale": 0.7}),
             (ties, base, {"density": 0.3, "scale": 1.0}))  # fmt: skip
    for rule, origin, options in cases:
        result = merged(rule, reads[1:], (97, 24), None if origin is None else reads[0], **options)
        assert torch.equal(result, rule([one, two], base=origin, name="embed", **options)), rule.plan.__name__


def test_ids_of_the_donor_stay_and_new_tokens_follow_in_the_order_of_the_models():
    models = {"a": vocabulary("p", "q"), "b": vocabulary("s", "q", "r"), "c": vocabulary("t", "r", "p")}
    assert list(combine(models, "b", "union").tokens) == ["s", "q", "r", "p", "t"]
    assert list(combine(models, "b").tokens) == ["s", "q", "r"]
    assert list(combine(models, "b", "c").tokens) == ["t", "r", "p"]
    with pytest.raises(ConfigError, match=r"tokenizer.source 'd'.*base, union, a, b, c"):
        combine(models, "b", "d")


def test_padding_rows_are_inherited_unless_a_multiple_is_asked_for():
    models = {"a": vocabulary("x", "y"), "b": vocabulary("y", "x", "z")}
    rows = {"a": 5, "b": 6}
    kept = combine(models, "a", rows=rows)
    # Row 2 is padding in a and a token in b: b takes a's; rows 3 and 4 are padding in both.
    assert {n: p.tolist() for n, p in kept.permutations.items()} == {"a": [0, 1, 2, 3, 4], "b": [1, 0, -1, 3, 4]}
    a, b = torch.arange(5.0).view(5, 1), 10 + torch.arange(6.0).view(6, 1)
    assert [m.flatten().tolist() for m in filled(kept, [a, b])] == [[0, 1, 2, 3, 4], [11, 10, 2, 13, 14]]
    assert combine(models, "a", pad_to_multiple_of=2, rows=rows).rows == 2
    grown = combine(models, "a", pad_to_multiple_of=8, rows=rows)
    assert [m.flatten().tolist() for m in filled(grown, [a, b])] == [
        [0, 1, 2, 3, 4, 0.5, 0.5, 0.5], [11, 10, 2, 13, 14, 10.5, 10.5, 10.5],
    ]  # fmt: skip
    # The union's new token takes the place of padding.
    united = combine(models, "a", "union", rows=rows)
    assert (united.rows, united.tokens["z"]) == (5, 2)
    assert [m.flatten().tolist() for m in filled(united, [a, b])] == [[0, 1, 12, 3, 4], [11, 10, 12, 13, 14]]


def test_missing_rows_come_from_the_donor_the_only_owner_or_the_mean_of_the_owners():
    models = {"a": vocabulary("x"), "b": vocabulary("x", "y", "z"), "c": vocabulary("z", "x", "w")}
    a, b, c = (torch.tensor([[v] for v in values]) for values in ([1.0], [2.0, 3.0, 4.0], [6.0, 7.0, 8.0]))
    plan = combine(models, "a", "union")
    assert list(plan.tokens) == ["x", "y", "z", "w"]
    assert [m.flatten().tolist() for m in filled(plan, [a, b, c])] == [[1, 3, 5, 8], [2, 3, 4, 8], [7, 3, 6, 8]]
    donor = combine(models, "b", "union")
    assert [m.flatten().tolist() for m in filled(donor, [a, b, c])] == [[1, 3, 4, 8], [2, 3, 4, 8], [7, 3, 6, 8]]


def test_a_token_without_any_row_is_zero_and_counted():
    models = {"a": vocabulary("x", "<pad>"), "b": vocabulary("x", "<pad>")}
    plan = combine(models, "a", rows={"a": 1, "b": 1})
    layout = lay_out(plan)
    assert (plan.rows, layout.zeros) == (2, 1)
    assert "1 tokens have no row in any model ('<pad>')" in layout.words[0]
    assert filled(plan, [torch.ones(1, 2), torch.ones(1, 2)])[1].tolist() == [[1, 1], [0, 0]]
    ruled = lay_out(plan, {"<pad>": TokenRule(source="b#0")})
    assert (ruled.zeros, ruled.words) == (0, ())


def test_rules_come_before_all_else_and_force_replaces_what_a_model_has():
    models = {"a": vocabulary("x"), "hub/b#1": vocabulary("x", "y", "##z")}
    plan = combine(models, "a", "union")
    tensors = [torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0], [4.0]])]

    def rows(**rules: TokenRule) -> list[list[float]]:
        return [m.flatten().tolist() for m in filled(plan, tensors, rules)]

    assert rows() == [[1, 3, 4], [2, 3, 4]]
    assert rows(y=TokenRule(source="zero")) == [[1, 0, 4], [2, 3, 4]]
    assert rows(y=TokenRule(source="zero", force=True)) == [[1, 0, 4], [2, 0, 4]]
    assert rows(y=TokenRule(source="a#0")) == [[1, 1, 4], [2, 3, 4]]
    assert rows(y=TokenRule(source="a#x", force=True)) == [[1, 1, 4], [2, 1, 4]]
    assert rows(x=TokenRule(source="hub/b#1", force=True)) == [[2, 3, 4], [2, 3, 4]]
    assert rows(x=TokenRule(source="hub/b#1###z", force=True)) == [[4, 3, 4], [4, 3, 4]]


@pytest.mark.parametrize(
    ("token", "source", "said"),
    [
        ("q", "zero", "no such token.*union"), ("y", "c", "must be zero, a model, model#id or model#token.*a, b"),
        ("y", "a", "a has no token 'y'"), ("x", "b#q", "b has no token 'q'"), ("x", "b#7", "row 7 is beyond.*have 2"),
    ],
)  # fmt: skip
def test_rules_that_name_nothing_are_refused(token, source, said):
    plan = combine({"a": vocabulary("x"), "b": vocabulary("x", "y")}, "a", "union")
    with pytest.raises(ConfigError, match=rf"tokenizer\.tokens\.{token}.*{said}"):
        lay_out(plan, {token: TokenRule(source=source)})


def test_the_longest_name_of_a_model_that_fits_is_meant():
    models = {"b": vocabulary("x", "1#y"), "b#1": vocabulary("y", "x")}
    tensors = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    plan = combine(models, "b")
    result = filled(plan, tensors, {"x": TokenRule(source="b#1#y", force=True)})
    assert [m.flatten().tolist() for m in result] == [[3, 2], [3, 2]]


def test_a_new_letter_needs_no_merge():
    words = combine({"a": vocabulary("p"), "b": vocabulary("p", "é", "pp")}, "a", "union").words
    assert "can never produce 1 of its entries, as no merge forms them ('pp')" in words[-1]


def test_differences_are_said_in_words():
    models = {"a": vocabulary("p", "q", "<e>", "<r>", eos_token="<e>"),
              "b": vocabulary("q", "p", "<f>", "ten", eos_token="<f>")}  # fmt: skip
    words = combine(models, "a", "union").words
    assert words[0] == "a: 2 tokens are in no other model ('<e>', '<r>')"
    assert words[1] == "b: 2 tokens are in no other model ('<f>', 'ten')"
    assert words[2].startswith("b: 4 tokens have other ids than in the result ('p', 'q', '<f>', 'ten'); harmless")
    assert words[3].startswith(
        "b: 4 ids stand for other tokens than in the result (0 is 'q', not 'p', 1 is 'p', not 'q'"
    )
    assert words[4] == "b: its eos_token is '<f>', the result's is a's, '<e>'"
    assert words[5].startswith(
        "the result's tokenizer can never produce 1 of its entries, as no merge forms them ('ten')"
    )
    assert len(words) == 6
    dropped = combine(models, "a").words
    assert any(line.startswith("b: 2 of its tokens are not in the result ('<f>', 'ten')") for line in dropped)
    same = combine({"a": models["a"], "b": models["a"]}, "a", "union")
    assert same.words == () and same.new == ()


def test_vocabularies_that_are_only_copied_must_be_equal():
    one, other = (Vocabulary("tokenizer.model", {}, {}, {}, {}, digest) for digest in "xy")
    plan = combine({"a": one, "b": one}, "a", rows={"a": 3, "b": 3})
    matrix = torch.randn(3, 2)
    assert [m.tolist() for m in filled(plan, [matrix, matrix + 1])] == [
        matrix.double().tolist(),
        (matrix + 1).double().tolist(),
    ]
    for second in (other, vocabulary("x")):
        with pytest.raises(
            IncompatibleModelsError, match=r"a: its tokenizer is a tokenizer\.model alone.*save_pretrained"
        ):
            combine({"a": one, "b": second}, "a")


def test_only_needed_rows_are_read_and_neighbours_at_once():
    names = [f"t{i}" for i in range(12)]
    moved = vocabulary(*names[6:], *names[:6])
    plan = combine({"a": vocabulary(*names), "b": moved}, "a")
    a, b = Counted(torch.randn(12, 3)), Counted(torch.randn(12, 3))
    reads = permuted([a.reader, b.reader], lay_out(plan))
    reads[0](4, 32)
    assert a.ranges == [(4, 32)]  # nothing moves: the same range, to the element
    reads[1](0, 36)
    assert b.ranges == [(0, 36)]  # two blocks that touch in the file
    b.ranges.clear()
    reads[1](12, 24)  # t4 to t7, of which t4 and t5 are its rows 10 and 11, t6 and t7 its rows 0 and 1
    assert b.ranges == [(0, 6), (30, 36)]
    b.ranges.clear()
    assert reads[1](7, 7).shape == (0,)
    assert reads[1](7, 8).tolist() == [b.flat[8 * 3 + 1].double().item()]


def test_heads_and_their_biases_are_read_the_same_way():
    plan = combine({"one": AB, "two": BC}, "one", "union")
    bias = filled(plan, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    assert [b.flatten().tolist() for b in bias] == [[1, 2, 4], [1, 3, 4]]


def test_tensors_with_too_few_rows_or_another_width_are_refused():
    layout = lay_out(combine({"one": AB, "two": BC}, "one"))
    for second in (torch.randn(1, 2), torch.randn(2, 3)):
        with pytest.raises(IncompatibleModelsError, match=r"two: has \("):
            permuted([Counted(ONE).reader, Counted(second).reader], layout)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[str]], str, int | None, list[int]]:
    token = st.sampled_from([f"t{i}" for i in range(14)])
    models = draw(st.lists(st.lists(token, min_size=1, max_size=9, unique=True), min_size=1, max_size=4))
    source = draw(st.sampled_from(["base", "union", *(f"m{i}" for i in range(len(models)))]))
    spare = draw(st.lists(st.integers(-1, 4), min_size=len(models), max_size=len(models)))
    return models, source, draw(st.sampled_from([None, 1, 4, 8])), spare


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 5), st.integers(1, 17))
def test_any_vocabularies_give_rows_by_token_whatever_the_pieces(case, width, piece):
    """Against a loop over tokens and models that does by dict and list what the arrays do."""
    models, source, unit, spare = case
    named = {f"m{i}": vocabulary(*tokens) for i, tokens in enumerate(models)}
    rows = {f"m{i}": max(1, len(tokens) + more) for i, (tokens, more) in enumerate(zip(models, spare, strict=True))}
    plan = combine(named, "m0", source, unit, rows)
    generator = torch.Generator().manual_seed(7)
    tensors = {n: torch.randn(count, width, generator=generator) for n, count in rows.items()}
    whole = filled(plan, list(tensors.values()))
    for place, name in enumerate(named):
        for token, i in plan.tokens.items():
            have = {
                n: tensors[n][v.tokens[token]].double() for n, v in named.items() if v.tokens.get(token, 99) < rows[n]
            }
            zero = torch.zeros(width, dtype=torch.float64)
            mean = sum(have.values(), zero) / max(1, len(have))
            assert torch.equal(whole[place][i], have.get(name, have.get("m0", mean)))
        for i in range(plan.known, min(plan.rows, rows[plan.origin])):
            own = i >= len(named[name].tokens) and i < rows[name]
            assert torch.equal(whole[place][i], tensors[name if own else plan.origin][i].double())
        if plan.rows > max(plan.known, rows[plan.origin]):
            mean = whole[place][: plan.known].mean(0)
            torch.testing.assert_close(whole[place][-1], mean, rtol=1e-12, atol=1e-12)
    for name, read in zip(named, permuted([Counted(t).reader for t in tensors.values()], lay_out(plan)), strict=True):
        count = plan.rows * width
        pieces = [read(a, min(a + piece, count)) for a in range(0, count, piece)]
        assert torch.equal(torch.cat(pieces), whole[list(named).index(name)].flatten())
    if source == "union":
        assert list(plan.tokens)[: len(models[0])] == models[0]


def test_a_large_vocabulary_is_matched_fast():
    """A loop over rows and models in Python would take minutes; the bound leaves room for a loaded machine."""
    names = [f"t{i}" for i in range(150_000)]
    models = {f"m{k}": vocabulary(*names[k * 100 :], *names[: k * 100]) for k in range(4)}
    start = time.process_time()
    plan = combine(models, "m0", "union")
    layout = lay_out(plan)
    assert time.process_time() - start < 15
    assert layout.index[3, 300] == 0 and layout.index[3, 299] == 149_999
