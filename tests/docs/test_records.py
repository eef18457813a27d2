"""The benchmarks page shows the newest record of a GPU that lies in the folder, or says that there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_records import written

pytest.importorskip("sphinx", reason="the site's packages are not installed: pip install 'tinymoe[docs]'")
pytest.importorskip("myst_parser", reason="the site's packages are not installed: pip install 'tinymoe[docs]'")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(tmp_path):
    """Return what builds a page of the directive alone over the records of a folder, and reads it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text("# Measured\n\n```{moe-record}\n```\n")
    configuration = [
        "import pathlib, sys",
        f"sys.path.insert(0, {str(ROOT / 'docs')!r})",
        "from extension.records import MoERecord",
        f"MoERecord.folder = pathlib.Path({str(tmp_path)!r})",
        "extensions, html_theme = ['myst_parser', 'extension.records'], 'basic'",
    ]
    (source / "conf.py").write_text("\n".join(configuration))

    def build():
        build = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", source, tmp_path / "out"]
        done = subprocess.run(build, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "out" / "index.html").read_text()

    return build


def test_page_without_a_record_says_so_in_a_sentence(page):
    html = page()
    assert "Nothing has been measured on a GPU yet" in html
    assert "<table" not in html
    assert "<img" not in html


def test_page_shows_goals_comparisons_and_a_picture_in_words(page, tmp_path):
    written(tmp_path / "moe-a.json", "2000-01-01")
    html = page()
    assert html.count("<table") == 3
    assert 'src="data:image/png;base64,' in html
    assert 'alt="Roofline on logarithmic axes' in html
    assert "Nothing has been measured" not in html
