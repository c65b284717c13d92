"""What the benchmark scripts share, and that each of them says what it is for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import attention_methods  # noqa: E402
import common  # noqa: E402
import decode_attention_peers as peers  # noqa: E402
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


def test_attention_bytes_and_points(monkeypatch):
    """A format's bytes per token are those of its pool; points beyond the pool or the memory are left out."""
    monkeypatch.setattr(attention_methods, "DEVICE", "cpu")
    for name, form in attention_methods.FORMATS.items():
        if name != "quantspec":
            pool = form.pool(2, 256)
            assert sum(x.nbytes for x in pool) == 256 * 2 * form.bytes_per_token
    point = attention_methods.Point(32, 8, 4096, 4)
    token = 4 * 8
    assert peers.bytes_read("fa3", point, 1) == token * 4096 * 512
    assert peers.bytes_read("draft", point, 1) == token * (3840 * 136 + 256 * 512)
    assert peers.bytes_read("target", point, 5) == token * (3840 * 264 + 256 * 512)
    assert peers.pool_tokens(8, ["fa3", "draft"], 140 << 30) == 2 << 20
    assert peers.pool_tokens(8, ["fa3", "draft"], 1 << 30) == int(0.7 * 2**30 / 8 / (512 + 264)) // 128 * 128
    assert peers.sets_of(point, "fa3", 1, 2 << 20) == 16
    assert peers.sets_of(point, "fa3", 1, 4 * 4096) == 1
    assert [p.name for p in peers.all_points(["32/8 128k x1"])] == ["32/8 128k x1"]


SCRIPTS = sorted(p.name for p in BENCHMARKS.glob("*.py") if "\nif __name__" in p.read_text())
# Each script in a process of its own, a copy of one that has imported PyTorch.
ASK = """
import os, runpy, sys, torch
folder, sys.path[0], *scripts = sys.argv[1:]
for script in scripts:
    if not os.fork():
        with open(os.path.join(folder, script), "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.argv[:] = os.path.join(sys.path[0], script), "--help"
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit("did not end with its help")
    print(script, os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """{script: its status and what it says when it is asked for help}"""
    folder = tmp_path_factory.mktemp("helps")
    command = [sys.executable, "-c", ASK, folder, BENCHMARKS, *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return {name: (int(code), (folder / name).read_text()) for name, code in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, helps):
    status, text = helps[script]
    assert status == 0, text
    assert f"usage: {script}" in text


def test_texts_with_a_planted_passage_and_the_table_of_sparse_drafts(monkeypatch):
    for name, value in (("VLLM_LOGGING_LEVEL", "INFO"), ("VLLM_CPU_KVCACHE_SPACE", "1")):
        monkeypatch.setenv(name, value)  # importing the script sets what is not set
    import acceptance

    prompts = [list(range(1000 * i, 1000 * i + 300)) for i in range(2)]
    for text, prompt, other in zip(acceptance.planted(prompts, 40), prompts, prompts[::-1], strict=True):
        assert text[130:170] == other[:40] and text[-20:] == other[:20]
        assert text[:130] == prompt[:130] and text[170:-20] == prompt[170:-20]
    found = acceptance.cases(["a"], ["all", "0.1"], ["window", "snapkv"])
    assert found[0] == ("a", {}) and [more["draft_selection"] for _, more in found[1:]] == ["window", "snapkv"]
    row = {"config": "a", "context": 8, "temperature": 0.7, "novel": "all", "per_position": [0.9, 0.8], "accepted": 1.7}
    sparse = {"per_position": [0.87, 0.7], "accepted": 1.57, "draft_context": "0.1", "draft_selection": "window"}
    table = acceptance.sparse_table([row, row | sparse | {"read_share": 0.12}]).splitlines()
    assert table[-1] == "| 8 | 0.7 | all | window | 0.1 | 12.0 % | 0.870 | 3.0 | 2.57 | 95.2 % |"
