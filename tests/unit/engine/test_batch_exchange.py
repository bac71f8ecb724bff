"""A row on its way between ranks; tests/distributed sends rows for real."""

from __future__ import annotations

import torch

from megatron_gemini.engine.batch_exchange import BatchExchange, _packet, _row
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import rows
from tests.unit.data.test_loader import content


def test_a_packet_holds_a_row_without_the_values_of_its_media_wherever_it_lies():
    packets = [torch.from_numpy(_packet(batch).copy()) for batch in rows(0)]
    assert all(len(packet) % 64 == 0 for packet in packets)
    arrived = torch.cat(packets).split(list(map(len, packets)))
    for batch, packet in zip(rows(0), arrived, strict=True):
        assert content(_row(packet)) == content(batch.without_values())
        values = sum(media.values_PC.nbytes for media in batch.media.values())
        assert len(packet) < 96 * 40 + 2000 + 64 * 20 and (not values or values > 1000)


def test_a_packet_holds_the_columns_of_an_objective():
    for batch in rows(0):
        batch.columns = {
            "score": torch.rand(len(batch.samples)),
            "emphasis": torch.arange(len(batch.token_T), dtype=torch.int8),
            "chosen": torch.arange(len(batch.samples)) % 2 == 0,
        }
        packet = torch.from_numpy(_packet(batch).copy())
        assert content(_row(packet)) == content(batch.without_values())
        assert _row(packet).columns["chosen"].dtype == torch.bool


def test_a_process_by_itself_has_all_rows_with_all_values():
    everything = dict(enumerate(rows(0)))
    step = BatchExchange(Topology.serial(), torch.device("cpu")).share(everything, len(everything))
    assert step.readers == [0] * len(everything)
    assert [content(row) for row in step.rows] == [content(row) for row in everything.values()]
    del everything[3]
    assert BatchExchange(Topology.serial(), torch.device("cpu")).share(everything, 8).readers[3] == -1
