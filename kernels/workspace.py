"""Scratch memory on a GPU that all launches of a kernel share."""

import torch


class Workspace:
    """Tensors that grow as launches need more, one set per device: launches on a device follow one another.

    They are zero when allocated; a kernel that counts in one leaves it zero.

    Args:
        kernel: the function that launches, for the message.
        minimum: dtype and fewest elements of each tensor.
    """

    def __init__(self, kernel: str, *minimum: tuple[torch.dtype, int]):
        self._kernel, self._minimum = kernel, minimum
        self._tensors: dict[int, list[torch.Tensor]] = {}
        # CUDA graphs captured earlier keep pointing at the tensors that larger ones replaced, so those are never freed.
        self._retired: list[list[torch.Tensor]] = []

    def tensors(self, device: int, *sizes: int) -> list[torch.Tensor]:
        """The tensors, of at least these numbers of elements.

        Raises:
            RuntimeError: they must grow while a CUDA graph is captured.
        """
        have = self._tensors.get(device)
        if have is not None and all(x.numel() >= n for x, n in zip(have, sizes, strict=True)):
            return have
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"Run {self._kernel} once with these shapes before capturing it in a CUDA graph.")
        if have is not None:
            self._retired.append(have)
            sizes = tuple(max(x.numel(), n) for x, n in zip(have, sizes, strict=True))
        self._tensors[device] = [
            torch.zeros(max(n, least), dtype=dtype, device=device)
            for n, (dtype, least) in zip(sizes, self._minimum, strict=True)
        ]
        return self._tensors[device]
