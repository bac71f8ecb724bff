"""How the packed rows of a step get from the ranks that have read them to the ranks that train on them.

Every rank of the job reads other rows, so that none is read or decoded twice. The tokens of a row, and the sizes and
places of its media, go to all ranks of its data-parallel rank. The values of its media (pixels, log-mels) stay with the
reader. The encoders' engine takes them from there to the rank that encodes them.

A packet is a row on its way: the lengths of header and body as two int64, the header and the body
(`data/packing/wire.py`). Each of the three is filled up to a multiple of 64 bytes, so that the tensors of every row of
a buffer are aligned.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron_gemini.contracts import Batch, StepRows
from megatron_gemini.data.packing.wire import from_bytes, parse_header, to_bytes
from megatron_gemini.parallel.encoders.assignment import peers
from megatron_gemini.parallel.topology import Topology

_UNIT = 64  # bytes


class BatchExchange:
    """Shares rows between the ranks of the world. Collective, over the CPUs also where the ranks have GPUs.

    pin: the rows that arrive are in page-locked memory.
    """

    def __init__(self, topology: Topology, device: torch.device) -> None:
        self.topology, self.pin = topology, device.type == "cuda"
        # Of its own beside NCCL's, which carries nothing but the GPU's tensors: rows are packed and unpacked on the
        # host.
        self.group = dist.new_group(backend="gloo") if self.pin and topology.world > 1 else None
        self._peers = [peers(topology, data_rank) for data_rank in range(topology.data_size)]

    def share(self, read: dict[int, Batch], rows: int) -> StepRows:
        """What this rank has of a global step of `rows` rows. read: by number, the rows that it has read itself.

        A row that nobody has read is missing; the caller knows why, and tells the others before anybody trains.
        """
        if self.topology.world == 1:
            present = [number for number in range(rows) if number in read]
            return StepRows([read[number] for number in present], read, [0 if n in read else -1 for n in range(rows)])
        packets = {number: _packet(batch) for number, batch in sorted(read.items())}
        # Of every row the bytes and the reader. At most one rank has read it, so a sum of zeros and its entry is its
        # entry; counted from 1, the readers' zeros are the rows that nobody has read.
        table = torch.zeros(2, rows, dtype=torch.int64)
        for number, packet in packets.items():
            table[:, number] = torch.tensor([len(packet), self.topology.rank + 1])
        dist.all_reduce(table, group=self.group)
        sizes, readers = table[0].tolist(), (table[1] - 1).tolist()
        return StepRows(self._exchange(packets, sizes, readers), read, readers)

    def _exchange(self, packets: dict[int, np.ndarray], sizes: list[int], readers: list[int]) -> list[Batch]:
        topology, size = self.topology, self.topology.data_size
        to: list[list[np.ndarray]] = [[] for _ in range(topology.world)]
        for number, packet in packets.items():
            for rank in self._peers[number % size]:
                to[rank].append(packet)
        coming = [number for number in range(topology.data_rank, len(sizes), size) if readers[number] >= 0]
        # An all-to-all delivers by rank, and every reader sends its rows in ascending order.
        coming.sort(key=lambda number: (readers[number], number))
        receive = [0] * topology.world
        for number in coming:
            receive[readers[number]] += sizes[number]
        send = [sum(map(len, each)) for each in to]
        # numpy concatenates no empty list, and a rank may have read nothing in this step.
        nothing = np.empty(0, np.uint8)
        leaving = torch.from_numpy(np.concatenate([nothing, *(packet for each in to for packet in each)]))
        arrived = torch.empty(sum(receive), dtype=torch.uint8, pin_memory=self.pin)
        dist.all_to_all_single(arrived, leaving, receive, send, group=self.group)
        rows = dict(zip(coming, map(_row, arrived.split([sizes[number] for number in coming])), strict=True))
        return [rows[number] for number in sorted(rows)]


def _packet(batch: Batch) -> np.ndarray:
    """uint8: a row without the values of its media."""
    header, body = to_bytes(batch.without_values(), {})
    lengths = np.array([len(header), len(body)], np.int64).tobytes()
    parts = [part.ljust(-(-len(part) // _UNIT) * _UNIT, b"\0") for part in (lengths, header, bytes(body))]
    return np.frombuffer(b"".join(parts), np.uint8)


def _row(packet: torch.Tensor) -> Batch:
    """The row of a packet, whose tensors are views of it."""
    lengths = packet[:16].view(torch.int64).tolist()
    begin = _UNIT + -(-lengths[0] // _UNIT) * _UNIT
    header = parse_header(packet[_UNIT : _UNIT + lengths[0]].numpy().tobytes())
    return from_bytes(header, packet[begin : begin + lengths[1]])
