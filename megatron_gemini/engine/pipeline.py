"""The one file that touches the internals of torch.distributed.pipelining. Checked with torch 2.13.

The schedules are torch's; what a stage does with a microbatch is ours: forward and backward go through the stage's
engine. One more thing is changed: buffers for what other ranks send are made when they are asked for and dropped once
they are used, where torch keeps those of all microbatches for ever.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Generic, TypedDict, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules, stage

from megatron_gemini.engine.module_engine import Between, HasLoss, ModuleEngine
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.topology import Topology

Row = TypeVar("Row")
Output = TypeVar("Output")

_STAGE_METHODS = (
    "_get_recv_ops",
    "_retrieve_recv_activations",
    "_retrieve_recv_grads",
    "forward_maybe_with_nosync",
    "backward_maybe_with_nosync",
    "clear_runtime_states",
)
_RECEIVED = ("is_root_arg", "buffer", "tensor_meta")


class _Backward(TypedDict):
    """What torch hands a stage for a backward."""

    stage_output: torch.Tensor | tuple[torch.Tensor, ...]
    output_grads: tuple[torch.Tensor, ...] | None
    input_values: list[torch.Tensor]


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


class _Stage(pipelining.PipelineStage, Generic[Output]):
    """torch's stage, whose computation is an engine's.

    like: a tensor of the shape and dtype of what stages hand on. hold: gather the engine's weights once for all
    forwards of a step and once for all backwards, which a breadth-first order allows.
    """

    def __init__(
        self,
        engine: ModuleEngine[..., Output | Between],
        index: int,
        stages: int,
        like: torch.Tensor,
        topology: Topology,
        hold: bool,
    ) -> None:
        # Inputs and outputs by example, or torch would run every stage once to see their shapes.
        super().__init__(engine.module, index, stages, like.device, like, like, group=topology.pipeline_group)
        self.engine, self.hold = engine, hold and engine.gathers
        self.collect: Callable[[Output], None] = lambda output: None
        self.microbatches = self.forwards = self.backwards = 0

    def begin(self, microbatches: int, collect: Callable[[Output], None], backward: bool) -> None:
        """Before the first microbatch of a step."""
        self.clear_runtime_states()
        self.has_backward = backward
        self.microbatches, self.collect = microbatches, collect
        self.forwards = self.backwards = 0

    def forward_maybe_with_nosync(self, *args: torch.Tensor, **kwargs: Row) -> tuple[torch.Tensor, ...]:
        self._before(self.forwards)
        output = self.engine.forward(*args, **kwargs)
        self.forwards += 1
        self._after(self.forwards)
        if not self.is_last:
            return cast(Between, output)
        result = cast(Output, output)
        self.collect(result)
        return (cast(HasLoss, result).loss,) if self.has_backward else ()

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, torch.Tensor], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], None]:
        assert backward_type == "full", "ZeRO reduces gradients as they come: no schedule may split the backward"
        assert isinstance(self.engine, ZeroEngine), "a frozen model has no backward"
        self._before(self.backwards)
        given = cast(_Backward, bwd_kwargs)
        output, grads = given["stage_output"], given["output_grads"]
        if grads is not None:
            # A scalar whose gradients are those received, for the engine's one way to go backward: DeepSpeed divides
            # a gradient that it is handed directly by the number of microbatches, once a stage.
            output = torch.stack([(y * grad).sum() for y, grad in zip(output, grads, strict=True)]).sum()
        self.engine.backward(cast(torch.Tensor, output), last_backward)
        self.backwards += 1
        self._after(self.backwards)
        inputs = given["input_values"]  # what came from the stage before, and the row
        return tuple(value.grad if isinstance(value, torch.Tensor) else None for value in inputs), None

    def _before(self, done: int) -> None:
        if self.hold and done == 0:
            self.engine.hold()

    def _after(self, done: int) -> None:
        if self.hold and done == self.microbatches:
            self.engine.release()

    def _get_recv_ops(self, recv_infos: tuple[stage._RecvInfo, ...]) -> list[dist.P2POp]:
        for info in recv_infos:
            meta = info.tensor_meta
            if not info.is_root_arg and meta is not None:
                # On demand: with 32 microbatches torch would hold 32 of each.
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        tensors = super()._retrieve_recv_activations(fwd_chunk_id)
        self._drop(self.args_recv_info[fwd_chunk_id])
        return tensors

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        tensors = super()._retrieve_recv_grads(bwd_chunk_id)
        self._drop(self.grad_recv_info[bwd_chunk_id])
        return tensors

    @staticmethod
    def _drop(recv_infos: tuple[stage._RecvInfo, ...]) -> None:
        for info in recv_infos:
            info.buffer = None


class Pipeline(Generic[Output]):
    """The stages of this rank in one schedule.

    engines: this rank's virtual stages, in order; each module's forward(h or nothing, row=...) returns (h,) or, on the
        last stage, an Output, which has a `.loss` where there is a backward. like: see `_Stage`.
    Raises RuntimeError where torch lacks what this needs.
    """

    def __init__(
        self,
        engines: Sequence[ModuleEngine[..., Output | Between]],
        topology: Topology,
        schedule: str,
        like: torch.Tensor,
    ) -> None:
        check_torch()
        self.schedule = schedule
        stages, hold = topology.pipeline_size * len(engines), schedule == "breadth_first"
        self.stages: list[_Stage[Output]] = [
            _Stage(engine, topology.pipeline_rank + n * topology.pipeline_size, stages, like, topology, hold)
            for n, engine in enumerate(engines)
        ]
        self._schedules: dict[tuple[int, bool], schedules._PipelineSchedule] = {}

    def run(self, rows: Sequence[Row], collect: Callable[[Output], None], scale: float | None) -> None:
        """All rows through all stages; with a scale also the backward of scale * loss of each.

        collect: called with every output of the last stage, on its rank.
        """
        for one in self.stages:
            one.begin(len(rows), collect, scale is not None)
        with contextlib.ExitStack() as kept:
            # Breadth-first a stage is held for its own microbatches alone, which are all in a row.
            for one in () if self.schedule == "breadth_first" else self.stages:
                kept.enter_context(one.engine.kept())
            self._run(rows, scale)
        # What torch keeps of a step until the next one: inputs and outputs of all microbatches.
        for one in self.stages:
            one.clear_runtime_states()

    def _run(self, rows: Sequence[Row], scale: float | None) -> None:
        key = (len(rows), scale is not None)
        if key not in self._schedules:
            self._schedules[key] = self._new_schedule(*key)
        schedule, inputs = self._schedules[key], [{"row": row} for row in rows]
        # Not `step`, which cuts one batch into microbatches; these are there already, and no tensors.
        if scale is None:
            schedule._step_microbatches(kwarg_mbs=inputs)
        else:
            # Anew in each step, since the scale has the sum of the step's loss weights in it.
            schedule._loss_fn = lambda output, _: output[0] * scale
            # torch looks a target up for every loss; here the loss is the last stage's output, and needs none.
            schedule._step_microbatches(kwarg_mbs=inputs, target_mbs=[None] * len(rows), return_outputs=False)

    def _new_schedule(self, microbatches: int, backward: bool) -> schedules._PipelineSchedule:
        # A schedule is forward-only if it is made without a loss; `run` puts the real one in its place.
        # The loss is a sum that has been divided by the step's weight, so torch must not scale gradients.
        loss = (lambda output, _: output[0]) if backward else None
        breadth_first = self.schedule == "breadth_first"
        if len(self.stages) == 1:
            one = schedules.ScheduleGPipe if breadth_first else schedules.Schedule1F1B
            return (one if backward else schedules._ScheduleForwardOnly)(
                self.stages[0], microbatches, loss_fn=loss, scale_grads=False
            )
        # Without a backward there is nothing to interleave it with, and the simpler order will do.
        many = schedules.ScheduleLoopedBFS if breadth_first or not backward else schedules.ScheduleInterleaved1F1B
        return many(list(self.stages), microbatches, loss_fn=loss, scale_grads=False)
