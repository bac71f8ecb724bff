"""Saving and loading against torch's distributed checkpoint (DCP), and against the floor: as many bytes, flushed.

    python tools/bench/checkpoint.py --folder /tmp/bench --gigabytes 2 --tensors 200 --rounds 5
    python tools/bench/checkpoint.py --folder /dev/shm/bench --gigabytes 2 --tensors 20000 --rounds 5

One process. The three save the same float32 tensors in turn, each to a new folder and flushed to the disk: ours with
its hashes and its index, DCP by its FileSystemWriter with 1, 2 and 4 threads, the floor by writes of the bare bytes.
Before a load the files leave the page cache (a tmpfs has no other place for them). Ours compares every block with its
hash; DCP compares nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from megatron_gemini.checkpoint.index import seal, write_text
from megatron_gemini.checkpoint.piece import WEIGHT, Piece
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.checkpoint.tensor_file import Outgoing, write_tensors

State = dict[str, torch.Tensor]


def state(gigabytes: float, count: int) -> State:
    each = int(gigabytes * 1e9 / 4 / count)
    return {f"tensor.{number:05d}": torch.randn(each) for number in range(count)}


def save_ours(tensors: State, folder: Path) -> None:
    folder.mkdir(parents=True)
    pieces = [Piece(n, 0, t.numel(), tuple(t.shape), None, 0, tuple(t.shape)).to_json() for n, t in tensors.items()]
    name = "rank-00000.safetensors"
    outgoing = [
        Outgoing(f"{WEIGHT}/{n}", tuple(t.shape), t.dtype, partial(tensors.__getitem__, n)) for n, t in tensors.items()
    ]
    entry = write_tensors(folder / name, outgoing)
    write_text(folder / "rank-00000.json", json.dumps({"pieces": pieces, "data": {}}))
    seal(folder, entries={name: entry})


def load_ours(tensors: State, folder: Path) -> None:
    reader = PieceReader(folder)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        reader.read_into(WEIGHT, Piece(name, 0, tensor.numel(), shape, None, 0, shape), tensor)


def save_dcp(tensors: State, folder: Path, threads: int) -> None:
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, thread_count=threads, sync_files=True), no_dist=True)


def load_dcp(tensors: State, folder: Path) -> None:
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def save_floor(tensors: State, folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "all").open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def load_floor(tensors: State, folder: Path) -> None:
    with (folder / "all").open("rb", buffering=0) as file:
        for tensor in tensors.values():
            file.readinto(tensor.numpy().data)


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where is written; its file system is measured")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state (default: %(default)s)")
    parser.add_argument("--tensors", type=int, default=200, help="in how many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default: %(default)s)")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    tensors = state(options.gigabytes, options.tensors)
    savers: dict[str, Callable[[State, Path], None]] = {"ours": save_ours, "floor": save_floor}
    savers |= {f"DCP, {threads} threads": partial(save_dcp, threads=threads) for threads in (1, 2, 4)}
    loaders: dict[str, Callable[[State, Path], None]] = {"ours": load_ours, "floor": load_floor}
    loaders |= {name: load_dcp for name in savers if name.startswith("DCP")}
    saved: dict[str, list[float]] = {name: [] for name in savers}
    loaded: dict[str, list[float]] = {name: [] for name in savers}
    for _ in range(options.rounds):
        for name in savers:
            folder = options.folder / "state"
            shutil.rmtree(folder, ignore_errors=True)
            saved[name].append(seconds(partial(savers[name], tensors, folder)))
            forget(folder)
            target = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
            loaded[name].append(seconds(partial(loaders[name], target, folder)))
            assert all(torch.equal(target[key], tensors[key]) for key in tensors), name
            shutil.rmtree(folder)
    for what, took in (("save", saved), ("load", loaded)):
        print(", ".join(f"{name} {statistics.median(each):.2f} s" for name, each in took.items()), f"({what}, medians)")
        best = min((name for name in took if name.startswith("DCP")), key=lambda name: statistics.median(took[name]))
        for other in (best, "floor"):
            median = statistics.median(b / a for a, b in zip(took["ours"], took[other], strict=True))
            print(f"{what}: {other} / ours {median:.2f} (median), {min(took[other]) / min(took['ours']):.2f} (minima)")


if __name__ == "__main__":
    main()
