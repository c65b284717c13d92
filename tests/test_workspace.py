"""The kernels' scratch memory grows, never shrinks, and never moves under a CUDA graph."""

import pytest
import torch

from vllm_quantspec.kernels.workspace import Workspace


@pytest.fixture
def capturing(monkeypatch):
    """Whether a graph is captured, in a list that a test may change."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


def test_it_grows_and_keeps_what_graphs_point_at(capturing):
    workspace = Workspace("kernel", (torch.float32, 0), (torch.int32, 16))
    first = workspace.tensors("cpu", 100, 3)
    assert [(x.dtype, x.numel()) for x in first] == [(torch.float32, 100), (torch.int32, 16)]
    assert not first[1].any()
    assert workspace.tensors("cpu", 90, 16) is first
    more = workspace.tensors("cpu", 50, 20)
    assert [x.numel() for x in more] == [100, 20]
    assert workspace._retired == [first]  # alive, as captured graphs write to it
    assert workspace.tensors("meta", 1, 1)[0].device.type == "meta"
    assert workspace.tensors("cpu", 100, 20) is more


def test_it_refuses_to_grow_during_a_capture(capturing):
    workspace = Workspace("some_kernel", (torch.float32, 8))
    have = workspace.tensors("cpu", 8)
    capturing[0] = True
    assert workspace.tensors("cpu", 8) is have
    with pytest.raises(RuntimeError, match="Run some_kernel once with these shapes before capturing"):
        workspace.tensors("cpu", 9)
    assert workspace._retired == []
