"""Which text a corpus has, from the library, from files, and from a seed."""

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymoe.corpora import cut_docstrings, from_paths, read_documents, standard_library, synthetic
from tinymoe.errors import InputError


def chosen(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:2], 16) < 26


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# Docstrings.

BLANK = "\x0c \u2028\x85"  # what str.splitlines, though not Python, takes for the end of a line
WORDS = st.text("aé漢🎉" + BLANK, max_size=8)
LITERALS = st.one_of(
    WORDS.map('"{}"'.format),
    WORDS.map("r'{}'".format),
    WORDS.map("('{}' \"ü\")".format),
    st.lists(WORDS, max_size=3).map(lambda lines: '"""' + "\n    ".join(lines) + '"""'),
)


@st.composite
def blocks(draw, indent="", depth=0, documented=True):
    """Pieces (text, is it a docstring?) of a block of statements."""
    pieces = []
    if documented and draw(st.booleans()):
        pieces += [
            (indent, False),
            (draw(LITERALS), True),
            (draw(st.sampled_from(["\n", "  # é\n", "; é = 1\n"])), False),
        ]
    pieces.append((f"{indent}é = 'no docstring'\n", False))
    for _ in range(draw(st.integers(0, 2))):
        plain = [f"{indent}'é no docstring'\n", f"{indent}x = lambda: '''no\ndocstring'''\n", f"{indent}f('é')\n"]
        pieces.append((draw(st.sampled_from(plain)), False))
        header = draw(st.sampled_from(["def é():", "async def é(a='é'):", "class É:", "if é:", "try:", "match é:"]))
        documented = header.startswith(("def", "async", "class"))
        if documented and draw(st.booleans()):
            pieces += [(f"{indent}{header} ", False), (draw(LITERALS), True), ("\n", False)]
        elif depth < 2:
            inner = indent + "\t"
            pieces.append((f"{indent}{header}\n", False))
            if header == "match é:":
                pieces.append((f"{inner}case 'é':\n", False))
                inner += " "
            pieces += draw(blocks(inner, depth + 1, documented))
            if header in ("if é:", "try:"):
                pieces.append((f"{indent}else:\n" if header == "if é:" else f"{indent}except é:\n", False))
                pieces += draw(blocks(inner, depth + 1, False))
    return pieces


@given(blocks(), st.sampled_from(["\n", "\r\n", "\r"]))
def test_docstrings_are_cut_to_the_byte(pieces, newline):
    pieces = [(text.replace("\n", newline), is_docstring) for text, is_docstring in pieces]
    code, docstrings = cut_docstrings("".join(text for text, _ in pieces).encode())
    assert code.decode() == "".join(text for text, is_docstring in pieces if not is_docstring)
    cleaned = [inspect.cleandoc(ast.literal_eval(text)) for text, is_docstring in pieces if is_docstring]
    assert docstrings.decode() == "\n\n".join(text for text in cleaned if text)


def test_docstring_behind_unicode_on_its_line_is_cut_and_other_strings_stay():
    source = (
        '"""Module."""\né = "🎉"\ndef f(é="漢"): "One é."; "no docstring"\n"nor this"\nclass A:\n x = 1\n "nor this"\n'
    )
    code, docstrings = cut_docstrings(source.encode())
    assert code.decode() == source.replace('"""Module."""', "").replace('"One é."', "")
    assert docstrings.decode() == "Module.\n\nOne é."


def test_docstring_with_a_lone_surrogate_does_not_stop_the_rest():
    assert cut_docstrings(b'"""\\ud800"""\nx = 1\n') == (b"\nx = 1\n", b"?")


# The standard library.


@pytest.fixture(scope="module")
def library():
    return standard_library()


def test_library_has_three_domains_of_some_size(library):
    assert list(library.train) == list(library.held_out) == ["code", "prose", "docstrings"]
    sizes = {domain: sum(len(d.text) for d in documents) for domain, documents in library.train.items()}
    assert sizes["code"] > 3e6
    assert sizes["prose"] > 2e5
    assert sizes["docstrings"] > 5e5


def test_library_is_held_out_by_the_hash_of_the_path(library):
    for domain in library.train:
        assert not any(chosen(document.name) for document in library.train[domain])
        assert all(chosen(document.name) for document in library.held_out[domain])
    names = {document.name for part in (library.train, library.held_out) for document in part["code"]}
    assert {"os.py", "json/decoder.py", "collections/__init__.py"} <= names


def test_no_held_out_document_of_the_library_is_trained_on(library):
    train = {document.text for documents in library.train.values() for document in documents}
    held_out = [document.text for documents in library.held_out.values() for document in documents]
    assert len(set(held_out)) == len(held_out)
    assert train.isdisjoint(held_out)


def test_docstrings_are_held_out_exactly_when_their_code_is(library):
    trained_code, held_out_code = ({d.name for d in part["code"]} for part in (library.train, library.held_out))
    assert trained_code.isdisjoint(document.name for document in library.held_out["docstrings"])
    assert held_out_code.isdisjoint(document.name for document in library.train["docstrings"])


def test_library_is_the_same_twice(library):
    assert standard_library() == library


def test_manifest_of_the_library_has_the_hashes_of_its_bytes(library):
    manifest = json.loads(json.dumps(library.manifest()))
    assert manifest["python"] == sys.version.split()[0]
    assert manifest["missing"] == []
    for domain, parts in manifest["domains"].items():
        for part, described in parts.items():
            text = b"".join(document.text for document in getattr(library, part)[domain])
            assert described["bytes"] == len(text)
            assert described["sha256"] == hashlib.sha256(text).hexdigest()


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A library of good modules among everything that is to be passed over."""
    good = {f"module_{number}.py": f'"""Docs {number}."""\nx = {number}\n' for number in range(30)}
    good |= {"package/a.py": "a = 1\n", "package/inner/b.py": "b = 1\n", "é.py": "é = '\\d'\n"}
    excluded = "encodings lib2to3 config-3.11 test package/tests idlelib/idle_test site-packages dist-packages"
    bad = {f"{folder}/bad.py": "x = 'bad'\n" for folder in [*excluded.split(), "pydoc_data", "__pycache__"]}
    bad |= {"latin.py": b"# \xe9\n", "syntax.py": "x =\n", "nul.py": "x = 1\0\n", "text.txt": "text\n", "empty.py": ""}
    bad |= {"package/repeats.py": good["package/a.py"]}
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(write(tmp_path, good | bad))}.get)
    return sorted(good)


def test_library_passes_over_tests_tables_and_what_is_not_python(small_library):
    corpus = standard_library()
    names = [document.name for part in (corpus.train, corpus.held_out) for document in part["code"]]
    assert sorted(names) == small_library
    assert [document.name for document in corpus.train["code"]] == [n for n in small_library if not chosen(n)]


def test_library_without_topics_has_no_prose_and_says_so(small_library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    manifest = standard_library().manifest()
    assert manifest["missing"] == ["prose"]
    assert list(manifest["domains"]) == ["code", "docstrings"]


def test_python_without_sources_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "python311.zip")}.get)
    with pytest.raises(InputError, match=r"no sources of its library .* --data PATH"):
        standard_library()


# Files.


def test_each_path_is_a_domain_of_its_own_name(tmp_path):
    write(
        tmp_path, {"a/notes": "one of these", "b/notes": "another one", "b/c.txt": "the third of these", ".h": "hidden"}
    )
    paths = [tmp_path / "a" / "notes", tmp_path / "b" / "notes", str(tmp_path / "b" / "c.txt"), tmp_path / "a/../.h"]
    corpus = from_paths(paths)
    assert list(corpus.train) == ["notes", "notes-2", "c.txt", ".h"]
    assert corpus.train["notes-2"][0].text + corpus.held_out["notes-2"][0].text == b"another one"
    assert corpus.manifest()["paths"] == list(map(str, paths))


def test_folder_is_read_in_order_without_hidden_files_and_binaries(tmp_path):
    text = {"z.txt": "z", "a/b/c.md": "c", "a.txt": "🎉", "a/space d": "d\r\n"}
    passed_over = {".git/config": "x", "a/.hidden": "x", "image.png": b"\x89PNG", "zeros": b"a\0", "empty": b""}
    write(tmp_path, text | passed_over)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    documents = read_documents(tmp_path)
    assert [(document.name, document.text.decode()) for document in documents] == sorted(text.items())
    assert {document.domain for document in documents} == {tmp_path.name}


def test_folder_is_held_out_by_the_hash_of_the_relative_path(tmp_path):
    files = {f"part {number % 3}/{number}.txt": f"text {number}" for number in range(60)}
    corpus = from_paths([write(tmp_path, files)])
    (documents,) = corpus.held_out.values()
    assert [document.name for document in documents] == sorted(filter(chosen, files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is neither a file nor a folder"),
        ({"given": ""}, "is empty"),
        ({"given": b"caf\xe9"}, "is not UTF-8 text, see its byte 3"),
        ({"given": b"ab\0"}, "is not text, its byte 2 is zero"),
        ({"given/.hidden": "x", "given/binary": b"\xff", "given/empty": ""}, "holds no file of UTF-8 text"),
    ],
)
def test_path_without_text_is_an_error_of_one_line(tmp_path, files, message):
    with pytest.raises(InputError, match=f"given {message}.*: ") as error:
        from_paths([write(tmp_path, files) / "given"])
    assert "\n" not in str(error.value)


def test_no_path_and_the_same_path_twice_are_errors(tmp_path):
    path = write(tmp_path, {"given": "some text of a file"}) / "given"
    with pytest.raises(InputError, match="no text is given"):
        from_paths([])
    with pytest.raises(InputError, match="given-2 has 0 bytes"):
        from_paths([path, path])


# Synthetic.


def test_synthetic_bytes_never_change():
    manifest = json.dumps(synthetic(seed=0, bytes_per_domain=8192).manifest(), sort_keys=True)
    assert (
        hashlib.sha256(manifest.encode()).hexdigest()
        == "c9501ed00a3ef63477af317f79a2516eaf1e2656ea5f561746b2ab92cf291c5c"
    )


def test_synthetic_text_depends_on_the_seed():
    assert synthetic(0, 2048) == synthetic(0, 2048)
    texts = [{d.text for documents in synthetic(seed, 2048).train.values() for d in documents} for seed in (0, 1, -1)]
    assert not texts[0] & texts[1]
    assert not texts[1] & texts[2]


def test_synthetic_domains_are_what_their_names_say():
    corpus = synthetic(0, 4096)
    lines = {domain: b"".join(d.text for d in corpus.train[domain]).decode().splitlines() for domain in corpus.train}
    for line in lines["arithmetic"]:
        sum_, value = line.split("=")
        assert eval(sum_) == int(value)
    for line in lines["brackets"]:
        while line != (line := re.sub(r"\(\)|\[\]|\{\}", "", line)):
            pass
        assert line == ""
    assert all(re.fullmatch(r"[A-Z][a-z]+( [a-z]+){3,10}\.", line) for line in lines["words"])
    assert all(re.fullmatch(r"([A-Z]+=0x[0-9A-F]{4};?){3}", line) for line in lines["records"])


def test_synthetic_domains_have_the_size_asked_for_and_something_held_out():
    corpus = synthetic(0, 4096)
    for domain in corpus.train:
        assert corpus.train[domain]
        assert corpus.held_out[domain]
        size = sum(len(document.text) for part in (corpus.train, corpus.held_out) for document in part[domain])
        assert 4096 <= size < 8192
    with pytest.raises(InputError, match="bytes_per_domain is 0"):
        synthetic(0, 0)
