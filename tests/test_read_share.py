"""How much of the cache sparse drafts read: in the log, and as counters that a server shows which are another process's."""

import logging
import os
import subprocess
import sys

from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot

from vllm_quantspec.integration.draft import read_share
from vllm_quantspec.integration.draft.read_share import ReadShare

LABELS = ("books", "0")
WORKER = """
from vllm_quantspec.integration.draft.read_share import ReadShare
share = ReadShare(("books", "1"))
share.add(5, 14, 4)
share.add(1, 2, 3)
"""


def counted() -> list[float]:
    found = {m.name: m.value for m in get_metrics_snapshot() if m.labels.get("model_name") == LABELS[0]}
    return [found.get(f"vllm:quantspec_draft_pages{end}", 0) for end in ("_read", "")]


def test_the_share_is_logged_and_counted(caplog, monkeypatch):
    share = ReadShare(LABELS)
    before = counted()
    share.add(5, 14, 4)
    assert counted() == [before[0] + 20, before[1] + 56]
    assert share.mean == 20 / 56
    monkeypatch.setattr(share, "_last", -1e9)  # long ago
    monkeypatch.setattr(read_share.logger, "handlers", [caplog.handler])  # vLLM's loggers do not propagate
    with caplog.at_level(logging.INFO, read_share.logger.name):
        share.add(12, 12, 2)
        share.add(0, 0, 2)
    assert set(caplog.messages) == {"quantspec: draft steps read 55.0 % of the cache (mean of the last 6 steps)"}
    assert ReadShare(LABELS).mean == 1.0


def test_engines_in_a_row_count_on():
    """The next engine of a process drops all of vLLM's metrics when it starts; one without metrics of its own does not."""
    before = counted()
    ReadShare(LABELS).add(1, 2, 3)
    ReadShare(LABELS).add(1, 2, 3)
    unregister_vllm_metrics()
    ReadShare(LABELS).add(1, 2, 3)
    assert counted() == [before[0] + 9, before[1] + 18]


def test_other_workers_say_nothing(caplog, monkeypatch):
    before, share = counted(), ReadShare(None)
    monkeypatch.setattr(share, "_last", -1e9)
    monkeypatch.setattr(read_share.logger, "handlers", [caplog.handler])
    share.add(5, 14, 4)
    assert counted() == before and not caplog.messages
    assert share.mean == 5 / 14


def test_a_server_shows_what_its_workers_count(tmp_path):
    """vLLM's server collects so where PROMETHEUS_MULTIPROC_DIR is set, by the user or for several API servers."""
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WORKER], env=env, check=True, timeout=120)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    shown = generate_latest(registry).decode()
    assert 'vllm:quantspec_draft_pages_read_total{engine="1",model_name="books"} 23.0' in shown
    assert 'vllm:quantspec_draft_pages_total{engine="1",model_name="books"} 62.0' in shown
