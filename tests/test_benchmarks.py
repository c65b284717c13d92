"""What the benchmark scripts share, and that each of them says what it is for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import common  # noqa: E402
import needle  # noqa: E402


def test_texts_as_pg19_publishes_them(tmp_path):
    """The archive is a folder of N.txt beside a metadata.csv; the data set of the hub has a row per book."""
    test = tmp_path / "test"
    test.mkdir()
    (test / "10146.txt").write_text("Produced by\n\nA BOOK\n")
    (test / "10321.txt").write_text("ANOTHER\n", encoding="utf-8")
    (tmp_path / "metadata.csv").write_text("10146,A Book,1900,http://example.org\n")
    assert common.read_texts(test) == {"10146": "Produced by\n\nA BOOK\n", "10321": "ANOTHER\n"}
    assert common.read_texts(test / "10321.txt") == {"10321": "ANOTHER\n"}
    rows = [{"short_book_title": "A Book", "publication_date": 1900, "url": "", "text": "one"}, {"text": "two"}]
    (tmp_path / "pg19.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert common.read_texts(tmp_path / "pg19.jsonl") == {"A Book": "one", "1": "two"}
    with pytest.raises(ValueError, match="no text there"):
        common.read_texts(tmp_path)


def test_excerpts_are_spread_over_the_text():
    tokens = list(range(1000))
    parts = common.excerpts(tokens, 100, 4)
    assert all(part == list(range(part[0], part[0] + 100)) for part in parts)
    assert [part[0] for part in parts] == [112, 337, 562, 787]
    assert common.excerpts(tokens[:50], 100, 1) == [tokens[:50]]


def test_needles():
    texts = [list(range(1000)), list(range(5000, 6000))]
    planted, without = needle.prompts_of(texts, context=400, depths=4, needle=20)
    assert len(planted) == len(without) == 8 and {len(p) for p in planted + without} == {400}
    for number, (p, w) in enumerate(zip(planted, without, strict=True)):
        passage = p[-20:]
        assert w[-20:] == passage
        found = [i for i in range(380) if p[i : i + 20] == passage]
        assert found == [int((number % 4 + 0.5) / 4 * 360)]
        assert not any(w[i : i + 20] == passage for i in range(380))


@pytest.mark.parametrize("script", sorted(p.name for p in BENCHMARKS.glob("*.py") if p.name != "common.py"))
def test_help(script):
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: {script}" in done.stdout
