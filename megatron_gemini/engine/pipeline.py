"""The one file that touches the internals of torch.distributed.pipelining. Checked with torch 2.13.

The schedules are torch's; what a stage does with a microbatch is ours: forward and backward go through the stage's ZeRO
engine. One more thing is changed: buffers for what other ranks send are made when they are asked for and dropped once
they are used, where torch keeps those of all microbatches for ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules, stage

from megatron_gemini.engine.internals import gathering
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.topology import Topology

Collect = Callable[[Any], None]
_STAGE_METHODS = (
    "_get_recv_ops",
    "_retrieve_recv_activations",
    "_retrieve_recv_grads",
    "forward_maybe_with_nosync",
    "backward_maybe_with_nosync",
    "clear_runtime_states",
)


_RECEIVED = ("is_root_arg", "buffer", "tensor_meta")


def check_torch() -> None:
    """Raise RuntimeError that names what this release of torch lacks of what is overridden and used here."""
    received = inspect.signature(stage._RecvInfo.__init__).parameters
    missing = [f"PipelineStage.{name}" for name in _STAGE_METHODS if not hasattr(pipelining.PipelineStage, name)]
    missing += [f"pipelining.stage._RecvInfo.{name}" for name in _RECEIVED if name not in received]
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__} has no {missing[0]}, on which pipelines rely; checked with torch 2.13. "
            "Install that version (constraints.txt) or set parallel.pipeline to 1"
        )


class _Stage(pipelining.PipelineStage):
    """torch's stage, whose computation is a ZeRO engine's.

    like: a tensor of the shape and dtype of what stages hand on. hold: gather the engine's weights once for all
    forwards of a step and once for all backwards, which a breadth-first order allows.
    """

    def __init__(
        self, engine: ZeroEngine, index: int, stages: int, like: torch.Tensor, topology: Topology, hold: bool
    ) -> None:
        super().__init__(engine.module, index, stages, like.device, like, like, group=topology.pipeline_group)
        self.engine, self.hold = engine, hold and engine.gathers
        self.collect: Collect = lambda output: None
        self.microbatches = self.forwards = self.backwards = 0

    def begin(self, microbatches: int, collect: Collect, backward: bool) -> None:
        """Before the first microbatch of a step."""
        self.clear_runtime_states()
        self.has_backward = backward
        self.microbatches, self.collect = microbatches, collect
        self.forwards = self.backwards = 0

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        self._before(self.forwards)
        output = self.engine.forward(*args, **kwargs)
        self.forwards += 1
        self._after(self.forwards)
        if not self.is_last:
            return output
        self.collect(output)
        return (output.loss,)

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        assert backward_type == "full", "ZeRO reduces gradients as they come: no schedule may split the backward"
        self._before(self.backwards)
        output, grads = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        if grads is not None:  # a scalar whose gradients are those received, for the engine's one way to go backward
            output = sum((y * grad).sum() for y, grad in zip(output, grads, strict=True))
        self.engine.backward(output, last_backward)
        self.backwards += 1
        self._after(self.backwards)
        inputs = bwd_kwargs["input_values"]  # what came from the stage before, and the row
        return tuple(value.grad if isinstance(value, torch.Tensor) else None for value in inputs), None

    def _before(self, done: int) -> None:
        if self.hold and done == 0:
            gathering.hold(self.engine.deepspeed)

    def _after(self, done: int) -> None:
        if self.hold and done == self.microbatches:
            gathering.release(self.engine.deepspeed)

    def _get_recv_ops(self, recv_infos: Any) -> Any:
        for info in recv_infos:
            if not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        tensors = super()._retrieve_recv_activations(fwd_chunk_id)
        return self._taken(self.args_recv_info[fwd_chunk_id], tensors)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        return self._taken(self.grad_recv_info[bwd_chunk_id], super()._retrieve_recv_grads(bwd_chunk_id))

    @staticmethod
    def _taken(recv_infos: Any, tensors: Any) -> Any:
        for info in recv_infos:
            info.buffer = None
        return tensors


class Pipeline:
    """The stages of this rank in one schedule.

    engines: this rank's virtual stages, in order; each module's forward(h or nothing, row=...) returns (h,) or, on the
        last stage, something with a `.loss`. like: see `_Stage`. Raises RuntimeError where torch lacks what this needs.
    """

    def __init__(self, engines: Sequence[ZeroEngine], topology: Topology, schedule: str, like: torch.Tensor) -> None:
        check_torch()
        self.topology, self.schedule = topology, schedule
        stages = topology.pipeline_size * len(engines)
        self.stages = [
            _Stage(
                engine,
                topology.pipeline_rank + number * topology.pipeline_size,
                stages,
                like,
                topology,
                schedule == "breadth_first",
            )
            for number, engine in enumerate(engines)
        ]
        self._schedules: dict[tuple[int, bool], Any] = {}

    def run(self, rows: Sequence[Any], collect: Collect, scale: float | None) -> None:
        """All rows through all stages; with a scale also the backward of scale * loss of each.

        collect: called with every output of the last stage, on its rank.
        """
        backward = scale is not None
        for one in self.stages:
            one.begin(len(rows), collect, backward)
        schedule = self._schedule(len(rows), backward)
        schedule._loss_fn = (lambda output, _: output[0] * scale) if backward else None
        arguments: dict[str, Any] = {"kwarg_mbs": [{"row": row} for row in rows]}
        if backward:
            arguments |= {"target_mbs": [None] * len(rows), "return_outputs": False}
        schedule._step_microbatches(**arguments)
        for one in self.stages:
            one.clear_runtime_states()

    def _schedule(self, microbatches: int, backward: bool) -> Any:
        key = (microbatches, backward)
        if key not in self._schedules:
            self._schedules[key] = self._new_schedule(microbatches, backward)
        return self._schedules[key]

    def _new_schedule(self, microbatches: int, backward: bool) -> Any:
        loss = (lambda output, _: output[0]) if backward else None
        if len(self.stages) == 1:
            if not backward:
                one: Any = schedules._ScheduleForwardOnly
            else:
                one = schedules.ScheduleGPipe if self.schedule == "breadth_first" else schedules.Schedule1F1B
            return one(self.stages[0], microbatches, loss_fn=loss, scale_grads=False)
        many: Any = schedules.ScheduleInterleaved1F1B
        if self.schedule == "breadth_first" or not backward:
            many = schedules.ScheduleLoopedBFS
        return many(self.stages, microbatches, loss_fn=loss, scale_grads=False)
