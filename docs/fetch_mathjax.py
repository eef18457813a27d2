"""Fetch MathJax and its font, as package-lock.json pins them, into docs/_mathjax: what `make docs` does once.

The pages typeset their formulas with these files and ask nobody for others. npm is not needed: the lock says where each
archive lies and what its SHA-512 is.
"""

import base64
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
LOCK = HERE / "package-lock.json"
TARGET = HERE / "_mathjax"
# Package -> what of it the pages load, and where that goes.
WANTED = {
    "mathjax": (("tex-chtml.js", "input/tex/extensions/", "LICENSE"), "mathjax"),
    "@mathjax/mathjax-newcm-font": (("chtml.js", "chtml/", "LICENSE"), "mathjax/@mathjax/mathjax-newcm-font"),
}
SECONDS = 120


def archive(package: dict[str, str]) -> bytes:
    """Return the archive of one package of the lock, whose checksum is right."""
    with urllib.request.urlopen(package["resolved"], timeout=SECONDS) as answer:
        content = answer.read()
    method, _, expected = package["integrity"].partition("-")
    found = base64.b64encode(hashlib.new(method, content).digest()).decode()
    if found != expected:
        raise SystemExit(f"{package['resolved']}: its {method} is {found}, and the lock says {expected}")
    return content


def unpack(content: bytes, wanted: tuple[str, ...], folder: Path) -> None:
    """Write the wanted files of an archive into a folder."""
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        for member in files:
            name = member.name.removeprefix("package/")
            if member.isfile() and name.startswith(wanted):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(files.extractfile(member).read())


def main() -> None:
    """Fetch what is not there."""
    stamp = TARGET / "package-lock.json"
    if stamp.exists() and stamp.read_bytes() == LOCK.read_bytes():
        stamp.touch()
        return
    packages = json.loads(LOCK.read_text())["packages"]
    with tempfile.TemporaryDirectory(dir=HERE, prefix="_mathjax.") as partial:
        for name, (wanted, folder) in WANTED.items():
            unpack(archive(packages[f"node_modules/{name}"]), wanted, Path(partial) / "new" / folder)
        shutil.copyfile(LOCK, Path(partial) / "new" / LOCK.name)
        shutil.rmtree(TARGET, ignore_errors=True)
        (Path(partial) / "new").rename(TARGET)


if __name__ == "__main__":
    main()
