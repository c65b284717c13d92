"""The texts of copying.py, and what it derives; a scripted model writes its script."""

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import copying  # noqa: E402

from vllm_quantspec.config import AUTO_NUMBERS, NGRAM_NUMBERS  # noqa: E402
from vllm_quantspec.kernels.ngram_index import NgramIndex  # noqa: E402


@pytest.mark.parametrize("every", [10, 60])
def test_an_edited_document_is_mostly_the_document(every):
    rng = random.Random(0)
    document = rng.choices(range(10_000, 60_000), k=6000)
    answer = copying.edited(document, every, rng, 5000)
    assert answer != document and 0.8 < len(answer) / len(document) < 1.2
    # Of each token, whether it follows in the document what it follows here.
    pairs = set(zip(document, document[1:], strict=False))
    kept = sum(pair in pairs for pair in zip(answer, answer[1:], strict=False)) / len(answer)
    assert 1 - 12 / every < kept < 1 - 1 / every
    index, right = NgramIndex(document + answer[:20], 3, 5), 0
    for token in answer[20:]:
        match = index.find()
        right += match is not None and index.tokens[match.start] == token
        index.extend([token])
    assert right / len(answer) > 1 - 12 / every


def test_texts_of_a_context():
    text = list(range(5000))
    texts = copying.scripts(text, 3000, 500, [20.0], 9000)
    assert list(texts) == ["novel", "edited every 20"] and {len(t) for t in texts.values()} == {3500}
    assert texts["novel"] == text[:3500]
    document = 3000 - copying.BEGUN
    assert texts["edited every 20"][:document] == text[:document]
    with pytest.raises(ValueError, match="--text has 5000 tokens"):
        copying.scripts(text, 4800, 300, [20.0], 9000)


def test_configurations():
    arguments = {c: copying.engine_arguments(c, {"prompt_lookup_min": 2}, on_gpu=True) for c in (*copying.NAMED, "6")}
    assert arguments["6"]["speculative_config"] == copying.QUANTSPEC | {"num_speculative_tokens": 6}
    ours = arguments["ngram-auto"]["speculative_config"]
    assert ours["ngram"] == "auto" and ours["prompt_lookup_min"] == 2
    assert "prompt_lookup_min" not in copying.NAMED["ngram-auto"]["speculative_config"]
    assert arguments["vllm-ngram"]["speculative_config"]["method"] == "ngram_gpu"
    assert copying.drafted("6") == (6,) and copying.drafted("bf16") == () and copying.drafted("vllm-ngram") == (12,)
    assert set(copying.drafted("ngram-auto")) == {*AUTO_NUMBERS, *NGRAM_NUMBERS}


def test_what_is_compared():
    row = {"context": 8, "batch": 1, "text": "novel"}
    times = {"3": 4.0, "6": 5.0, "drafts-auto": 4.1, "ngram-auto": 2.0}
    rows = [row | {"config": config, "ms_per_token": time} for config, time in times.items()]
    rows.append(row | {"config": "bf16", "ms_per_token": 8.0, "context": 9})
    copying.compare(rows)
    assert rows[3]["over_quantspec"] == 2.0 and rows[3]["over_auto"] == pytest.approx(2.05)
    assert "over_quantspec" not in rows[-1]
