"""Vectors of rows: stored, read, made from words, and made by an encoder."""

import builtins
import importlib
import socket
import sys

import numpy as np
import pytest
from scipy.sparse.linalg import svds
from sklearn.feature_extraction.text import TfidfVectorizer

from honeloom.errors import MissingExtraError, RowsError, SourceError
from honeloom.runs import atomic
from honeloom.selection import tfidf
from honeloom.selection.tfidf import tfidf_vectors
from honeloom.selection.vectors import blocks_of, inverse_lengths, read_vectors, stored_vectors
from honeloom.testing import FakeRows
from honeloom.testing.fakes import chat_row

NUMBERS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def cut(array, size=7):
    return (array[start : start + size] for start in range(0, len(array), size))


def silent(text):
    raise AssertionError(f"unexpected warning: {text}")


def test_vectors_are_stored_and_mapped(tmp_path):
    path = tmp_path / "v.npy"
    found = stored_vectors(path, cut(NUMBERS.astype(np.float64)), 50)
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    assert not found.flags.writeable
    assert np.array_equal(found, NUMBERS)
    assert np.array_equal(np.load(path), NUMBERS)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]
    again = stored_vectors(path, cut(NUMBERS * 2), 50)
    assert np.array_equal(found, NUMBERS)  # who has the old file open keeps it
    assert np.array_equal(again, NUMBERS * 2)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([NUMBERS[:3]], "3 vectors for 50 rows"),
        ([NUMBERS, NUMBERS[:1]], "51 vectors for 50 rows"),
        ([], "0 vectors for 50 rows"),
        ([NUMBERS[:3], NUMBERS[:3, :2]], r"shape \(3, 2\), expected \(rows, 6\)"),
        ([NUMBERS[0]], r"shape \(6,\), expected \(rows, length\)"),
    ],
)
def test_blocks_that_do_not_fit_leave_no_file(tmp_path, blocks, message):
    with pytest.raises(ValueError, match=message):
        stored_vectors(tmp_path / "v.npy", blocks, 50)
    assert not list(tmp_path.iterdir())


def test_a_file_is_complete_or_not_there(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(atomic, "observers", [labels.append])
    stored_vectors(tmp_path / "v.npy", cut(NUMBERS), 50)
    assert labels == ["fsync v.npy", "rename v.npy"]

    def stop(label):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "observers", [stop])
    with pytest.raises(KeyboardInterrupt):
        stored_vectors(tmp_path / "w.npy", cut(NUMBERS), 50)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.parametrize("kind", ["f2", "f4", ">f8"])
def test_a_users_file_keeps_its_type(tmp_path, kind):
    np.save(tmp_path / "v.npy", NUMBERS.astype(kind))
    found = read_vectors(tmp_path / "v.npy", 50, warn=silent)
    assert isinstance(found, np.memmap)
    assert found.dtype == kind
    assert np.allclose(found, NUMBERS, atol=1e-2)


def test_rows_of_a_users_file_that_are_not_finite_are_counted(tmp_path):
    broken = NUMBERS.copy()
    broken[3, 0], broken[7] = np.inf, np.nan
    np.save(tmp_path / "v.npy", broken)
    warned = []
    assert np.array_equal(read_vectors(tmp_path / "v.npy", 50, warn=warned.append), broken, equal_nan=True)
    assert len(warned) == 1 and "2 of 50 vectors hold NaN or infinite numbers" in warned[0]
    np.save(tmp_path / "w.npy", np.full((4, 2), np.nan))
    with pytest.raises(SourceError, match="every one of the 4 vectors"):
        read_vectors(tmp_path / "w.npy", 4, warn=silent)


def test_what_is_wrong_with_a_users_file_is_said(tmp_path):
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "short.npy", NUMBERS)
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-40])
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    np.savez(tmp_path / "many.npz", NUMBERS)
    np.save(tmp_path / "flat.npy", NUMBERS[0])
    np.save(tmp_path / "whole.npy", np.ones((50, 2), dtype=np.int64))
    np.save(tmp_path / "less.npy", NUMBERS[:9])
    cases = {
        "absent.npy": "not a readable .npy file .No such file",
        "text.npy": "not a readable .npy file",
        "empty.npy": "not a readable .npy file",
        "short.npy": "not a readable .npy file",
        "objects.npy": "not a readable .npy file",
        "many.npz": "an archive of several arrays",
        "flat.npy": r"shape \(6,\) and type float32, expected \(rows, length\)",
        "whole.npy": "type int64, expected",
        "less.npy": "9 vectors for 50 usable rows",
    }
    for name, message in cases.items():
        with pytest.raises(SourceError, match=message) as caught:
            read_vectors(tmp_path / name, 50, warn=silent)
        assert name in str(caught.value)


def test_lengths_and_blocks():
    vectors = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1]], dtype=np.float32)
    assert inverse_lengths(vectors) == pytest.approx([0.2, 0, 0, 0])
    assert list(blocks_of(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]


WORDS = ["red", "green", "blue", "cat", "dog", "sun", "moon", "tree", "stone", "river", "x", "1"]


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        chat_row(f"row-{i:03d}", "say it", " ".join(rng.choice(WORDS[i % 2 :: 2], rng.integers(1, 9))))
        for i in range(count)
    ]


def vectors_of(given, **settings):
    return np.concatenate(list(tfidf_vectors(FakeRows(given), **{"size": 4, "seed": 0, **settings})))


def test_tfidf_is_the_truncated_svd_of_the_weights():
    given = rows(60)
    found = vectors_of(given)
    assert found.shape == (60, 4) and found.dtype == np.float32
    weights = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\b\w+\b").fit_transform(
        [f"{row.prompt}\n{row.response}" for row in given]
    )
    left, values, _ = svds(weights, k=4)
    assert np.allclose(found @ found.T, (left * values) @ (left * values).T, atol=1e-4)


def test_rows_of_like_words_are_near_each_other():
    found = vectors_of(rows(80))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    cosines, even = found @ found.T, np.arange(80) % 2 == 0
    assert cosines[np.ix_(even, even)].mean() > cosines[np.ix_(even, ~even)].mean() + 0.2


def test_tfidf_follows_the_ids_and_the_seed(monkeypatch):
    monkeypatch.setattr(tfidf, "SAMPLE", 30)
    given = rows(70)
    one, turned = vectors_of(given), vectors_of(given[::-1])
    assert np.array_equal(one, turned[::-1])
    assert np.array_equal(one, vectors_of(given))
    assert not np.allclose(np.abs(one), np.abs(vectors_of(given, seed=1)), atol=1e-3)


def test_tfidf_comes_in_blocks(monkeypatch):
    given = rows(50)
    whole = vectors_of(given)
    monkeypatch.setattr(tfidf, "BLOCK", 16)
    blocks = list(tfidf_vectors(FakeRows(given), size=4, seed=0))
    assert [len(block) for block in blocks] == [16, 16, 16, 2]
    assert np.array_equal(np.concatenate(blocks), whole)


def test_tfidf_of_few_rows_is_as_long_as_they_allow_and_a_row_without_words_has_none():
    assert vectors_of(rows(3), size=128).shape == (3, 3)
    found = vectors_of([*rows(5), chat_row("dots", "...", "!?")])
    assert np.isnan(found[5]).all() and np.isfinite(found[:5]).all()
    with pytest.raises(RowsError, match="none of 1 rows has a word"):
        vectors_of([chat_row("dots", "...", "!?")])


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny encoder with random weights, saved as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    plain = folder / "bert"
    plain.mkdir()
    (plain / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "say", "it", *WORDS]))
    BertTokenizerFast(str(plain / "vocab.txt"), model_max_length=32).save_pretrained(plain)
    config = BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(plain)
    words = Transformer(str(plain))
    SentenceTransformer(modules=[words, Pooling(16)]).save(str(folder / "encoder"))
    return folder / "encoder"


def test_an_encoder_in_a_folder_needs_no_network(encoder_folder, monkeypatch):
    from honeloom.backends.sentence_encoder import SentenceEncoder, sentence_vectors

    def refuse(*arguments, **settings):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    given = [*rows(40), chat_row("blank", "", "")]
    blocks = list(sentence_vectors(given, str(encoder_folder), device="cpu", batch_size=1))
    assert [block.shape for block in blocks] == [(32, 16), (9, 16)]
    found = np.concatenate(blocks)
    assert np.isnan(found[40]).all() and np.isfinite(found[:40]).all()
    other = np.concatenate(list(SentenceEncoder.open(str(encoder_folder), device="cpu", batch_size=8).embed(given)))
    assert np.allclose(found, other, atol=1e-5, equal_nan=True)  # neither padding nor the batch changes a row


def test_a_folder_without_an_encoder_is_named(encoder_folder, tmp_path):
    from honeloom.backends.sentence_encoder import SentenceEncoder

    with pytest.raises(SourceError, match=r"cannot be loaded .*safetensors weights, or use the embedding") as caught:
        SentenceEncoder.open(str(tmp_path), device="cpu")
    assert str(tmp_path) in str(caught.value)
    for weights in encoder_folder.rglob("*.safetensors"):
        weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(SourceError, match="cannot be loaded"):
        SentenceEncoder.open(str(encoder_folder), device="cpu")


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "sentence_transformers":
            raise ImportError("No module named 'sentence_transformers'", name="sentence_transformers")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "honeloom.backends.sentence_encoder", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'honeloom\[embed\]'"):
        importlib.import_module("honeloom.backends.sentence_encoder")
