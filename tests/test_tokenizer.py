"""Text to ids and back, whole and one token at a time."""

import json
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tinymoe.errors import InputError
from tinymoe.tokenizer import ByteTokenizer, load_tokenizer

LINES = [f"the cat number {i} sat on the mat, with {i * 7} other words" for i in range(300)]


def trained(tokenizer, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **options
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def json_directory(tmp_path_factory):
    """A tokenizer.json as Mixtral's: spaces as U+2581, and bytes for the characters it does not know."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]])
    trained(tokenizer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    directory = tmp_path_factory.mktemp("json")
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    return directory


@pytest.fixture(scope="module")
def byte_level_directory(tmp_path_factory):
    """A tokenizer.json as GPT-2's: tokens are strings of bytes, which may end inside a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("byte_level")
    trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    """A SentencePiece with byte fallback and without normalisation, as Mistral's are."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "lines.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "lines.txt"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return directory


@pytest.fixture(scope="module")
def loaded(json_directory, byte_level_directory, sentencepiece_directory):
    return {
        "bytes": ByteTokenizer(),
        "json": load_tokenizer(json_directory, 700),
        "byte level": load_tokenizer(byte_level_directory, 700),
        "sentencepiece": load_tokenizer(sentencepiece_directory, 700),
    }


KINDS = pytest.mark.parametrize("kind", ["bytes", "json", "byte level", "sentencepiece"])


def pieces(tokenizer, tokens):
    stream = tokenizer.stream()
    return [*(stream.feed(token) for token in tokens), stream.finish()]


# Characters that SentencePiece keeps: it writes spaces as U+2581 and ends at a NUL.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\u2581")) | st.text("the cat 🎉é漢\ufffd\n")


@KINDS
@given(text=TEXT)
def test_text_survives_the_round_trip(loaded, kind, text):
    tokens = loaded[kind].encode(text)
    assert loaded[kind].decode(tokens) == text
    assert all(0 <= token < loaded[kind].vocab_size for token in tokens)


@KINDS
@given(text=TEXT)
def test_text_of_a_stream_is_the_decoded_text(loaded, kind, text):
    tokens = loaded[kind].encode(text)
    assert "".join(pieces(loaded[kind], tokens)) == loaded[kind].decode(tokens)


@KINDS
def test_stream_gives_characters_whole(loaded, kind):
    tokens = loaded[kind].encode("a🎉")
    assert len(tokens) >= 5
    assert [piece for piece in pieces(loaded[kind], tokens) if piece] == ["a", "🎉"]


@KINDS
def test_stream_gives_text_as_soon_as_it_is_complete(loaded, kind):
    tokens = loaded[kind].encode("the cat sat on the mat")
    stream, text = loaded[kind].stream(), ""
    for count, token in enumerate(tokens, 1):
        text += stream.feed(token)
        assert text == loaded[kind].decode(tokens[:count])


@given(st.binary())
def test_any_bytes_are_text_and_tokens_and_a_stream(data):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(data)
    assert tokens.tobytes() == data
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == data.decode(errors="replace")
    assert "".join(pieces(tokenizer, tokens)) == data.decode(errors="replace")


@KINDS
@given(data=st.data())
def test_any_ids_of_a_padded_vocabulary_decode_without_an_error(loaded, kind, data):
    largest = 255 if kind == "bytes" else loaded[kind].vocab_size + 50
    tokens = data.draw(st.lists(st.integers(0, largest)))
    assert isinstance(loaded[kind].decode(tokens), str)
    assert all(isinstance(piece, str) for piece in pieces(loaded[kind], tokens))


@KINDS
def test_invalid_bytes_and_surrogates_in_the_input_are_replaced(loaded, kind):
    assert loaded[kind].decode(loaded[kind].encode(b"a\xff b")) == "a\ufffd b"
    assert loaded[kind].decode(loaded[kind].encode("a\udcff b")) == "a? b"


def test_stray_bytes_of_a_stream_come_out_as_replacement_characters():
    assert pieces(ByteTokenizer(), [0xFF, 0x41, 0xF0, 0x9F]) == ["\ufffd", "A", "", "", "\ufffd"]


def test_library_tokenizers_start_with_their_bos(loaded):
    for kind in ("json", "byte level", "sentencepiece"):
        assert loaded[kind].encode("the cat")[0] == 1
        assert loaded[kind].decode([1]) == ""


def test_a_files_truncation_and_padding_are_not_applied(loaded):
    lengths = [len(loaded["json"].encode(text)) for text in ("", "the cat sat on the mat " * 9)]
    assert lengths[0] == 1
    assert lengths[1] > 18


# Which tokenizer a directory has.


def test_directory_without_tokenizer_has_bytes_if_its_vocabulary_has_256(tmp_path):
    tokenizer = load_tokenizer(tmp_path, 256)
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_token) == (256, None)
    with pytest.raises(InputError, match=r"its vocabulary of 257 is not the 256 bytes: .* pass token ids from Python"):
        load_tokenizer(tmp_path, 257)


def test_json_comes_before_sentencepiece_and_versions_last(tmp_path, json_directory, sentencepiece_directory):
    model = (sentencepiece_directory / "tokenizer.model").read_bytes()
    expected = load_tokenizer(sentencepiece_directory, 700).encode("the cat").tolist()
    (tmp_path / "tokenizer.model.v1").write_bytes(b"not read")
    (tmp_path / "tokenizer.model.v3").write_bytes(model)
    assert load_tokenizer(tmp_path, 700).encode("the cat").tolist() == expected
    (tmp_path / "tokenizer.model.v3").write_bytes(b"not read")
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(tmp_path, 700).encode("the cat").tolist() == expected
    (tmp_path / "tokenizer.json").write_bytes((json_directory / "tokenizer.json").read_bytes())
    expected = load_tokenizer(json_directory, 700).encode("the cat").tolist()
    assert load_tokenizer(tmp_path, 700).encode("the cat").tolist() == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"model":\n', b"\xff\xfe\n\x00"])
def test_corrupt_file_is_an_error_of_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is no tokenizer that") as error:
        load_tokenizer(tmp_path, 400)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("package", "name"), [("tokenizers", "tokenizer.json"), ("sentencepiece", "tokenizer.model")])
def test_missing_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}: pip install 'tinymoe\[tokenizer\]'"):
        load_tokenizer(tmp_path, 400)


def test_tokenizer_larger_than_the_models_vocabulary_is_an_error(json_directory):
    size = load_tokenizer(json_directory, 700).vocab_size
    assert load_tokenizer(json_directory, size).vocab_size == size
    with pytest.raises(InputError, match=f"has ids up to {size - 1}, but the model's vocabulary has only {size - 1}"):
        load_tokenizer(json_directory, size - 1)


@pytest.mark.parametrize(("given_", "token"), [({}, None), (None, None), (2, 2), ([3, 4], 3), (0, 0)])
def test_end_of_text_is_read_from_the_config(tmp_path, given_, token):
    (tmp_path / "config.json").write_text(json.dumps({} if given_ == {} else {"eos_token_id": given_}))
    assert load_tokenizer(tmp_path, 256).eos_token == token


@pytest.mark.parametrize("given_", [256, -1, "2", 2.0, True, [], [256], [None], {}])
def test_end_of_text_that_is_no_token_is_an_error(tmp_path, given_):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": given_}))
    with pytest.raises(InputError, match=r"config.json: eos_token_id is .*; give an id below 256, or null"):
        load_tokenizer(tmp_path, 256)
