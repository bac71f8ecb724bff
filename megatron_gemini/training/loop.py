"""What every objective shares: the order of a step, saving, stopping, resuming, and the records of it all."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Generic

import torch.distributed as dist

from megatron_gemini.checkpoint import directory
from megatron_gemini.checkpoint.forecast import forecast
from megatron_gemini.checkpoint.index import write_text
from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.load import load
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import Asset, SaveError, save
from megatron_gemini.config.load import dump_config
from megatron_gemini.data.sources.identity import shared_with_validation
from megatron_gemini.engine.engine import StepResult
from megatron_gemini.engine.synchronize import StepFingerprint, synchronize_step
from megatron_gemini.objectives.base import Objective, Output, Step
from megatron_gemini.training import resume
from megatron_gemini.training.metrics import FILE_NAME, MetricsWriter
from megatron_gemini.training.plots import plot_losses
from megatron_gemini.training.progress import Progress
from megatron_gemini.training.rank_watch import watch_ranks
from megatron_gemini.training.run_lock import RunLock
from megatron_gemini.training.schedule import learning_rate
from megatron_gemini.training.skipped import NO_WEIGHT, NOT_FINITE, SkippedSteps
from megatron_gemini.training.stop import StopRequest, reason
from megatron_gemini.training.throughput import peak_memory_bytes
from megatron_gemini.training.trackers import warn_of

WATCHED_STEPS, DATA_SHARE = 20, 0.1  # a longer wait than this share of so many steps is worth a word


class Loop(Generic[Step, Output]):
    """Runs an objective from where its newest checkpoint left it to `train.steps`."""

    def __init__(self, objective: Objective[Step, Output], lock: RunLock | None = None) -> None:
        """lock: of the run's folder, on the rank that has it."""
        self.objective, self.config, self.engine = objective, objective.config, objective.engine
        self.main = objective.topology.rank == 0
        self.state = RunState()
        self.stop, self.lock = StopRequest(objective.run_dir if self.main else None), lock
        self.resumed_from, self.began = resume.find(self.engine, objective.run_dir, self.config.train.resume)
        # `init_from` is of a run's beginning alone: after a resume it would undo what the run has learned.
        if self.resumed_from:
            self.began += resume.check_settings(self.resumed_from, self.config, objective.assets())
            self.state = load(self.engine, self.resumed_from)
            objective.load_data_state(self.state.data)
            self.began += [f"going on from {self.resumed_from}", *self.state.told]
            if self.config.init_from:
                self.began += ["init_from was for the beginning of this run, which has weights of its own by now"]
        else:
            self.began += initialize(self.engine)
        self.began += forecast(self.engine, objective.run_dir, self.config.train.keep)
        if self.main:
            resume.record_start(objective.run_dir, self.state.run)
        self.waits: deque[tuple[float, float]] = deque(maxlen=WATCHED_STEPS)  # (waited for data, seconds) of steps
        self.waits_told = False
        self.skips = SkippedSteps(self.config.train.max_skipped_steps)
        self.save_due = False
        self.failed_saves = 0
        self.saved_to = self.resumed_from
        self.saved_updates = self.state.optimizer_steps if self.resumed_from else -1  # those of the newest checkpoint
        # Kept apart from the lanes, which are a step ahead while the ranks agree: saved is what was trained on.
        self.data = objective.data_state()

    def run(self) -> int:
        """Train to the end, or to the step at which the ranks agree to stop.

        Returns 0 at the end, otherwise what `stop.StopRequest.requested` found, after which the process should end:
        from then on it ignores the signals.
        """
        objective, train, number = self.objective, self.config.train, 0
        writer, progress = self._begin()
        self.stop.install()
        place = objective.topology
        watch = watch_ranks(place.rank, place.world, train.rank_timeout, lambda: self.state.step)
        try:
            while self.state.step < train.steps:
                started = time.perf_counter()
                read, problem = objective.read()
                waited = time.perf_counter() - started
                weight, number = self.synchronize(read, problem)
                if number:
                    # The step has been handed out but not trained on: the state before it is what is saved.
                    break
                step, outputs = objective.to_device(read), list[Output]()
                lr = learning_rate(self.state.step, self.config.optimizer.lr, self.config.schedule, train.steps)
                result = StepResult(0.0, skipped=True)
                if weight:  # the sum over all ranks, by which the loss is divided
                    self.engine.forward_backward(step, weight, outputs.append)
                    result = self.engine.step(lr)
                record = self.count(step, outputs, result, lr)
                self.watch_skips(result, weight, progress)
                record |= self.measure(record, time.perf_counter() - started, waited)
                if self._due(train.validation_every):
                    record |= objective.validation()
                writer.write(self.state.step, record)
                progress.update(self.state.step, record)
                self.watch_data(progress)
                self.save_due |= self._due(train.save_every)
                # While steps are skipped the weights may be what is wrong, and a save rotates older ones away.
                if self.save_due and not self.skips.in_a_row:
                    self.try_save(progress)
                self.skips.check(self.state.step, self.state.step == train.steps, self._newest())
            self.save(progress)
            self.report_skipped(progress)
        finally:
            if watch is not None:
                watch.close()
            writer.close()
            objective.close()
            progress.finish()
            # A run that stops still has to wait for the other ranks: a second signal must not end it before.
            if not number:
                self.stop.restore()
        self._end(number, progress)
        return number

    def _begin(self) -> tuple[MetricsWriter, Progress]:
        """Open what a run writes, and say how it begins."""
        rank, start = self.objective.topology.rank, self.state.step
        writer = MetricsWriter(self.config, self.objective.run_dir, rank, start)
        progress = Progress(self.config.train.steps, start, rank)
        shared = shared_with_validation(self.config.data) if self.main else ""
        for line in filter(None, (*self.objective.backends(), shared, *self.began)):
            progress.note(line)
        return writer, progress

    def count(self, step: Step, outputs: list[Output], result: StepResult, lr: float) -> dict[str, float]:
        """Count a step that was taken. Returns its record, from the sums of all ranks."""
        mine = self.objective.sums(outputs, step) | {"skipped_samples": float(self.objective.skipped().total())}
        sums = dict(zip(mine, self.engine.total(list(mine.values())), strict=True))
        record = self.objective.record(sums) | {"skipped_samples": int(sums["skipped_samples"])}
        self.state.step += 1
        self.state.tokens += int(record["tokens"])
        # Adam's bias correction counts real updates only.
        self.state.optimizer_steps += not result.skipped
        self.data = self.objective.data_state()
        return {**record, "learning_rate": lr, "gradient_norm": result.norm, "skipped": int(result.skipped)}

    def measure(self, record: Mapping[str, float], seconds: float, waited: float) -> dict[str, float]:
        """What a step took. seconds: of the whole step; waited: of these, for its data."""
        self.state.seconds += seconds
        self.waits.append((waited, seconds))
        return {
            "tokens_per_second": record["tokens"] / seconds,
            "step_seconds": seconds,
            "data_seconds": waited,
            "peak_memory_bytes": peak_memory_bytes(),
            **self.objective.utilization(record, seconds),
        }

    def watch_skips(self, result: StepResult, weight: float, progress: Progress) -> None:
        """Count a step as trained or skipped, and say the first time in a row why it was skipped."""
        reason = (NOT_FINITE if weight else NO_WEIGHT) if result.skipped else ""
        if self.skips.add(reason):
            progress.note(f"step {self.state.step} changed no weight: {reason}")

    def watch_data(self, progress: Progress) -> None:
        """Say once when the newest steps have waited for their data for more than a tenth of their time."""
        of_data, whole = map(sum, zip(*self.waits, strict=True))
        enough = self.state.step > 2 * WATCHED_STEPS  # the first ones also wait for what has to start
        if enough and of_data > DATA_SHARE * whole and not self.waits_told:
            self.waits_told = True
            progress.note(
                f"the newest {len(self.waits)} steps waited for data for {of_data / whole:.0%} of their time "
                "(data_seconds of step_seconds); raise data.workers or data.prefetch"
            )

    def synchronize(self, step: Step, problem: str) -> tuple[float, int]:
        """(sum of the step's loss weights, signal number to stop for or 0), the same on every rank."""
        objective, number = self.objective, self.state.step
        # A rank with a problem has no step to describe, but takes part: the others would wait for it.
        fingerprint = StepFingerprint(number, 0) if problem else objective.fingerprint(number, step)
        weight, stop = 0.0 if problem else objective.weight(step), self.stop.requested()
        # The loss is divided by the weight of all ranks' rows, so that neither packing nor ranks change a gradient.
        return synchronize_step(weight, stop, fingerprint, objective.topology, objective.device, problem)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the state as it is now, unless the newest one has the same weights."""
        # The last step of a run may also be one of `save_every`, and a run that resumes at its end has nothing to save.
        # Steps that were skipped since are taken again after a resume: their data lead to the same weights.
        if self.saved_updates == self.state.optimizer_steps:
            return
        if self.lock is not None:
            self.lock.check()
        self.state.data = self.data
        assets: dict[str, Asset] = {"config.yaml": dump_config(self.config), **self.objective.assets()}
        self.save_due = False  # also where it fails: the next one is due at its own step
        train = self.config.train
        path = save(self.engine, self.objective.run_dir, self.state, assets, train.keep, train.keep_every)
        self.saved_to, self.saved_updates = path, self.state.optimizer_steps
        progress.note(f"saved {path}")

    def try_save(self, progress: Progress) -> None:
        """As `save`, in the midst of a run: one that fails is told and counted, and costs no step."""
        try:
            self.save(progress)
        except SaveError as error:
            self.failed_saves += 1
            progress.note(f"warning: {error}; the run goes on ({self.failed_saves} of its saves have failed)")

    def _newest(self) -> str:
        return f"the newest checkpoint is {self.saved_to}" if self.saved_to else "there is no checkpoint yet"

    def _end(self, number: int, progress: Progress) -> None:
        """Write the summary; or say how a stopped run goes on, and end only when every rank is done."""
        if not number:
            self.write_summary()
            return
        self.stop.ignore()  # a launcher ends all ranks once one has ended, and this one is not done yet
        assert self.saved_to is not None, "the first save is never left out"
        here = self.saved_to.name == directory.step_directory(self.objective.run_dir, self.state.step).name
        saved = f"saved {self.saved_to}" if here else f"nothing was learned since {self.saved_to}"
        progress.note(
            f"stopped by {reason(number)} after step {self.state.step}; {saved}; the same command goes on from there"
        )
        self.stop.forget_file()
        if dist.is_initialized():
            dist.barrier()

    def report_skipped(self, progress: Progress) -> None:
        """Show what samples of all ranks were left out, and why."""
        total: Counter[tuple[str, str]] = Counter()
        for mine in self.engine.gather(self.objective.skipped()):
            total.update(mine)
        if total:
            lines = [f"  {source}  {why}  {count}" for (source, why), count in total.most_common()]
            progress.note("\n".join([f"skipped {total.total()} samples that could not be used:", *lines]))

    def write_summary(self) -> None:
        """summary.json: what the run took, for reports."""
        if not self.main:
            return
        seconds = max(self.state.seconds, 1e-9)
        summary = {
            "objective": self.config.objective.kind,
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "train_seconds": round(seconds, 3),
            "tokens_per_second": round(self.state.tokens / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "failed_saves": self.failed_saves,
        }
        write_text(self.objective.run_dir / "summary.json", json.dumps(summary, indent=1))
        try:
            plot_losses(self.objective.run_dir / FILE_NAME, self.objective.run_dir / "loss.png")
        except Exception as error:  # the run is done and saved; it does not fail for its figure
            warn_of("the figure of the losses", error)
