"""Where text comes from: the interpreter's own library, your files, or a seeded generator."""

import ast
import contextlib
import importlib
import inspect
import itertools
import os
import platform
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinymoe.data import Corpus, Document
from tinymoe.errors import InputError

# Folders of the library that hold tables, tests, other people's code, or the prose; and config-*, of its build.
NOT_CODE = {"encodings", "lib2to3", "pydoc_data", "test", "tests", "idle_test"}
NOT_CODE |= {"site-packages", "dist-packages", "__pycache__"}
SYNTHETIC_DOCUMENTS = 32  # a domain

# What may have a docstring, and the fields of a statement that hold more statements, in the order of the source.
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = ("body", "cases", "handlers", "orelse", "finalbody")


def standard_library() -> Corpus:
    """Return the text that is on every machine: the library of the running Python.

    Its domains are ``code`` (a document per module, without its docstrings), ``prose`` (the language reference behind
    help(), a document per topic; missing where that is not installed) and ``docstrings`` (a document per module, held
    out when its code is). The text differs between versions of Python; a manifest tells them apart.

    Raises
    ------
    InputError
        This Python has no sources of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    code, docstrings = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the sources
        for name in _files(library, lambda part: part not in NOT_CODE and not part.startswith("config-")):
            if name.endswith(".py"):
                with contextlib.suppress(InputError, SyntaxError):
                    rest, strings = cut_docstrings(_read(library / name))
                    code.append(Document("code", name, rest))
                    docstrings.append(Document("docstrings", name, strings))
    if not code:
        raise InputError(f"this Python has no sources of its library in {library}: give your own text with --data PATH")
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    prose = [Document("prose", topic, topics[topic].encode()) for topic in sorted(topics)]
    origin = {"source": "standard library", "python": platform.python_version(), "missing": [] if prose else ["prose"]}
    return Corpus.split([*code, *prose, *docstrings], origin)


def cut_docstrings(source: bytes) -> tuple[bytes, bytes]:
    """Return Python source without its docstrings, byte for byte, and the docstrings, cleaned, a blank line between.

    Raises
    ------
    SyntaxError
        The source is not of this Python.
    """
    lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    code, docstrings, end = [], [], 0
    for node in _docstrings(ast.parse(source.decode())):
        code.append(source[end : lines[node.lineno - 1] + node.col_offset])
        end = lines[node.end_lineno - 1] + node.end_col_offset
        docstrings.append(inspect.cleandoc(node.value.value))
    code.append(source[end:])
    return b"".join(code), "\n\n".join(filter(None, docstrings)).encode(errors="replace")


def from_paths(paths: Iterable[str | os.PathLike[str]]) -> Corpus:
    """Return the corpus of text files and folders; each is a domain of its own, named like it.

    Raises
    ------
    InputError
        No path is given, or one has no text (see `read_documents`) or repeats that of the paths before it.
    """
    paths = list(paths)
    if not paths:
        raise InputError("no text is given: name at least one file or folder")
    by_domain: dict[str, list[Document]] = {}
    for path in paths:
        name = _name(path)
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        domain = next(name for name in names if name not in by_domain)
        by_domain[domain] = [document._replace(domain=domain) for document in read_documents(path)]
    return Corpus.split(itertools.chain(*by_domain.values()), {"source": "files", "paths": list(map(str, paths))})


def read_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Return the text of a file, or of every file in a folder and below it, sorted by path; nothing is held out.

    In a folder, whatever is hidden, empty or not UTF-8 text is passed over.

    Raises
    ------
    InputError
        The path is absent, a file that is empty or not UTF-8 text, or a folder without any text.
    """
    domain = _name(path)
    if os.path.isfile(path):
        return [Document(domain, domain, _read(path))]
    if not os.path.isdir(path):
        raise InputError(f"{path} is neither a file nor a folder: give the path of some text")
    documents = []
    for name in _files(path, lambda part: not part.startswith(".")):
        with contextlib.suppress(InputError):
            documents.append(Document(domain, name, _read(os.path.join(path, name))))
    if not documents:
        raise InputError(f"{path} holds no file of UTF-8 text that is not hidden: give a folder with some text")
    return documents


def synthetic(seed: int = 0, bytes_per_domain: int = 65536) -> Corpus:
    """Return a corpus of four domains that nobody could confuse, for tests and golden numbers.

    They are ``arithmetic``, ``brackets``, ``words`` and ``records``: ASCII lines, in 32 documents each. The bytes
    depend on the arguments alone, not on machine or versions.

    Parameters
    ----------
    seed
        Any integer.
    bytes_per_domain
        The least size of a domain; each of its documents ends with a whole line.

    Raises
    ------
    InputError
        ``bytes_per_domain`` is less than 1.
    """
    if bytes_per_domain < 1:
        raise InputError(f"bytes_per_domain is {bytes_per_domain}; give at least 1")
    generators = {"arithmetic": _arithmetic, "brackets": _brackets, "words": _words, "records": _records}
    documents = []
    for domain, generate in generators.items():
        lines = generate(random.Random(f"{seed} {domain}"))
        for number in range(SYNTHETIC_DOCUMENTS):
            text = ""
            while len(text) * SYNTHETIC_DOCUMENTS < bytes_per_domain:
                text += next(lines) + "\n"
            documents.append(Document(domain, f"{domain}-{number:02}", text.encode()))
    return Corpus.split(documents, {"source": "synthetic", "seed": seed, "bytes_per_domain": bytes_per_domain})


def _arithmetic(rng: random.Random) -> Iterator[str]:
    while True:
        a, b = _below(rng, 100), _below(rng, 100)
        yield _pick(rng, (f"{a}+{b}={a + b}", f"{a}-{b}={a - b}", f"{a}*{b}={a * b}"))


def _brackets(rng: random.Random) -> Iterator[str]:
    while True:
        line, closing = "", ""
        while len(line) + len(closing) < 48:
            if closing and rng.random() < 0.5:
                line, closing = line + closing[0], closing[1:]
            else:
                pair = _pick(rng, ("()", "[]", "{}"))
                line, closing = line + pair[0], pair[1] + closing
        yield line + closing


def _words(rng: random.Random) -> Iterator[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(_pick(rng, syllables) for _ in range(1 + _below(rng, 3))) for _ in range(200)]
    while True:
        yield " ".join(_pick(rng, words) for _ in range(4 + _below(rng, 8))).capitalize() + "."


def _records(rng: random.Random) -> Iterator[str]:
    keys = ("ID", "SIZE", "MODE", "USER", "PORT", "FLAGS")
    while True:
        yield ";".join(f"{_pick(rng, keys)}=0x{_below(rng, 65536):04X}" for _ in range(3))


def _below(rng: random.Random, bound: int) -> int:
    # random() is the one method whose numbers Python promises never to change
    return int(rng.random() * bound)


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    return choices[_below(rng, len(choices))]


def _docstrings(tree: ast.Module) -> Iterator[Any]:
    """Yield the statements that are docstrings, in the order of the source."""
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            yield node.body[0]
        # only statements hold definitions; expressions, most of the tree, need no visit
        stack += reversed([child for field in BLOCKS for child in getattr(node, field, ())])


def _files(folder: str | os.PathLike[str], keep: Callable[[str], bool]) -> list[str]:
    """Return the sorted paths, relative and with '/', of the regular files below; ``keep`` judges every part of one."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = filter(keep, folders)
        # a pipe is no file: to read it would wait for a writer
        paths = [Path(parent, file) for file in files if keep(file) and os.path.isfile(os.path.join(parent, file))]
        found += [path.relative_to(folder).as_posix() for path in paths]
    return sorted(found)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        text = Path(path).read_bytes()
        text.decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, see its byte {error.start}: convert it, or leave it out") from None
    if b"\0" in text:
        raise InputError(f"{path} is not text, its byte {text.index(0)} is zero: leave it out")
    if not text:
        raise InputError(f"{path} is empty: give a file with some text")
    return text


def _name(path: str | os.PathLike[str]) -> str:
    return os.path.basename(os.path.abspath(path)) or str(path)
