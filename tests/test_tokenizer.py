"""Prompts as tokens, against direct calls of sentencepiece; the model is a tiny one, trained here."""

import string
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from fpo_jax.policies.tokenizer import (
    discretize_state,
    load_tokenizer,
    prompt_text,
    train_tiny_tokenizer,
)
from fpo_jax.types import FpoError

GOLDEN = np.load(Path(__file__).parent / "golden" / "openpi" / "transforms.npz")
SENTENCES = ["Transfer cube", "pick up the red cube and put it on the plate"] + [
    f"Task: transfer the cube, State: {i} {3 * i} 255 -1;\nAction: " for i in range(40)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tiny_tokenizer(path, SENTENCES, vocab_size=200)
    return path


@pytest.fixture(scope="module")
def direct(model):
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def test_the_tiny_model_has_paligemmas_conventions(model, direct):
    assert (direct.pad_id(), direct.eos_id(), direct.bos_id(), direct.unk_id()) == (0, 1, 2, 3)
    assert model.stat().st_size < 8000
    assert len(direct.encode("\n")) == 1
    assert direct.encode("255") == [direct.piece_to_id(digit) for digit in "255"]  # single digits
    assert direct.unk_id() not in direct.encode(string.digits + string.ascii_letters + string.punctuation + " \n")
    assert load_tokenizer(model).vocab_size == direct.vocab_size() <= 200


def test_training_is_deterministic(model, tmp_path):
    train_tiny_tokenizer(tmp_path / "again.model", SENTENCES, vocab_size=200)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_a_fixed_prompt_is_enough_to_train_on(tmp_path):
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer.model", ["Transfer"])
    assert tokenizer.processor.unk_id() not in tokenizer.encode("any other prompt", np.zeros(2))


def test_one_sentence_makes_words_and_none_makes_characters(tmp_path):
    words = train_tiny_tokenizer(tmp_path / "words.model", ["Transfer cube"])
    characters = train_tiny_tokenizer(tmp_path / "characters.model", [])
    assert characters.vocab_size == 4 + 1 + 95  # special, newline, ASCII
    assert len(characters.encode("Transfer cube")) == 2 + len("Transfer cube")
    assert len(words.encode("Transfer cube")) == 4  # BOS, two words, newline
    assert words.vocab_size < 128


def test_a_vocabulary_too_small_for_the_characters(tmp_path):
    with pytest.raises(FpoError, match="A tokenizer of 20 pieces has no room"):
        train_tiny_tokenizer(tmp_path / "tokenizer.model", ["Transfer cube"], 20)


# π0


@pytest.mark.parametrize("prompt", ["Transfer cube", "  Transfer_cube\n", "\nTransfer\ncube "])
def test_pi0_form(model, direct, prompt):
    ids, mask = load_tokenizer(model).tokenize(prompt, None, 24)
    expected = [2, *direct.encode("Transfer cube"), *direct.encode("\n")]
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids[: len(expected)].tolist() == expected
    assert not ids[len(expected) :].any()
    assert mask.tolist() == [True] * len(expected) + [False] * (24 - len(expected))


def test_an_empty_prompt(model, direct):
    assert load_tokenizer(model).encode("") == [2, *direct.encode("\n")]


def test_too_long_is_cut_at_the_end(model, direct):
    tokenizer = load_tokenizer(model)
    everything = tokenizer.encode("Transfer cube")
    for length in (1, 4, len(everything)):
        ids, mask = tokenizer.tokenize("Transfer cube", None, length)
        assert ids.tolist() == everything[:length]
        assert mask.all()


# π0.5


def test_bins():
    np.testing.assert_array_equal(discretize_state(GOLDEN["discretize/in"]), GOLDEN["discretize/out"])
    np.testing.assert_array_equal(discretize_state(np.float32(GOLDEN["discretize/in"])), GOLDEN["discretize/out"])
    assert discretize_state(np.zeros((2, 3))).shape == (2, 3)


def test_pi05_form(model, direct):
    state = np.asarray([-1.2, -1.0, 0.0, 0.99, 1.3], np.float32)
    text = "Task: transfer the cube, State: -1 0 128 254 255;\nAction: "
    assert prompt_text(" transfer_the\ncube\n", state) == text
    ids, mask = load_tokenizer(model).tokenize("transfer the cube", state, 200)
    expected = direct.encode(text, add_bos=True)
    assert expected[0] == 2
    assert ids[: len(expected)].tolist() == expected
    assert mask.sum() == len(expected)
    assert not ids[len(expected) :].any()


def test_pi05_without_state_is_pi0(model):
    tokenizer = load_tokenizer(model)
    assert prompt_text("a_b", None) == "a b"
    assert tokenizer.encode("Transfer cube") != tokenizer.encode("Transfer cube", np.zeros(14))


def test_batch(model):
    tokenizer = load_tokenizer(model)
    prompts = ["Transfer cube", "pick up the plate", ""]
    states = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)
    for batch in (states, None):
        ids, masks = tokenizer.tokenize_batch(prompts, batch, 120)
        assert ids.shape == masks.shape == (3, 120)
        assert (ids.dtype, masks.dtype) == (np.int32, bool)
        for i, prompt in enumerate(prompts):
            one = tokenizer.tokenize(prompt, None if batch is None else batch[i], 120)
            np.testing.assert_array_equal(ids[i], one[0])
            np.testing.assert_array_equal(masks[i], one[1])


def test_no_number_raises(model):
    states = np.asarray([[np.nan, np.inf, -np.inf, 3e38, -0.0]], np.float32)
    ids, mask = load_tokenizer(model).tokenize_batch(["Transfer cube"], states, 100)
    assert ids.shape == mask.shape == (1, 100)


@pytest.mark.parametrize("state_dim", [None, 8, 14])
def test_trimmed_length(model, state_dim):
    tokenizer = load_tokenizer(model)
    prompts = ["Transfer cube", "pick up the plate"]
    length = tokenizer.trimmed_length(prompts, state_dim, 200)
    if state_dim is None:
        assert length == max(len(tokenizer.encode(prompt)) for prompt in prompts)
    else:
        states = np.random.default_rng(0).uniform(-1.1, 1.1, (50, state_dim))
        lengths = [len(tokenizer.encode(prompt, state)) for prompt in prompts for state in states]
        assert max(lengths) <= length < 200
        assert length <= max(lengths) + state_dim  # numbers of one and two digits are shorter
    assert tokenizer.trimmed_length(prompts, state_dim, 5) == 5


# Where it comes from


def test_openpis_cache(model, monkeypatch, tmp_path, direct):
    (tmp_path / "big_vision").mkdir()
    (tmp_path / "big_vision" / "paligemma_tokenizer.model").write_bytes(model.read_bytes())
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    assert load_tokenizer().encode("cube") == [2, *direct.encode("cube"), *direct.encode("\n")]


def test_no_network(monkeypatch, tmp_path):
    from etils import epath

    def unplugged(path):
        raise OSError("Connection\nrefused.")

    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(type(epath.Path("gs://bucket/file")), "read_bytes", unplugged)
    with pytest.raises(FpoError) as error:
        load_tokenizer(None)
    cached = tmp_path / "big_vision" / "paligemma_tokenizer.model"
    assert str(error.value) == (
        "The tokenizer gs://big_vision/paligemma_tokenizer.model can't be read (Connection refused): "
        f"download it to {cached} or give the path of a copy."
    )
    with pytest.raises(FpoError, match=r"gs://mine/t.model can't be read \(Connection refused\): give the path"):
        load_tokenizer("gs://mine/t.model")


def test_missing_and_foreign_files(tmp_path, model):
    with pytest.raises(FpoError, match=r"There is no tokenizer file .*nothing"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FpoError, match="There is no tokenizer file"):
        load_tokenizer(str(tmp_path))  # a folder
    for content in (b"", b"<html>not found</html>", model.read_bytes()[:-7]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(FpoError, match="is no sentencepiece model"):
            load_tokenizer(tmp_path / "broken")
