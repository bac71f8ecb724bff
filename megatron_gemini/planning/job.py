"""What is planned: a configuration on a number of ranks, and the machine that they run on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from megatron_gemini.config.layout import data_size
from megatron_gemini.config.run import RunConfig
from megatron_gemini.planning.parameters import Stage, connector_parameters, encoder_parameters, stages
from megatron_gemini.planning.roles import PlannedRole, role_stages
from megatron_gemini.planning.zero_state import ZeroPlan
from megatron_gemini.registry import OBJECTIVES


@dataclass(frozen=True)
class Job:
    """A legal layout: `config` on `world` ranks. vocabulary: ids of the model, text, control and image codes."""

    config: RunConfig
    world: int
    vocabulary: int

    @cached_property
    def data(self) -> int:
        """Data-parallel ranks."""
        return data_size(self.config, self.world)

    @cached_property
    def microbatches(self) -> int:
        """Rows of a data-parallel rank in a step."""
        return self.config.train.rows_per_step // self.data

    @cached_property
    def stages(self) -> list[Stage]:
        return stages(self.config, self.vocabulary)

    def stages_of(self, pipeline_rank: int) -> list[Stage]:
        """The virtual stages of a pipeline rank, in order."""
        return self.stages[pipeline_rank :: self.config.parallel.pipeline]

    @cached_property
    def _roles(self) -> list[PlannedRole]:
        """Of the objective, each with all of its stages."""
        config, objective = self.config, self.config.objective
        found = []
        for size in OBJECTIVES.get(objective.kind).roles(objective, config):
            stage = config.engine.zero_stage if size.zero_stage is None else size.zero_stage
            zero = self._zero(stage, self.data * config.parallel.context)
            found.append(PlannedRole(size, role_stages(size, config, self.vocabulary), zero))
        return found

    def roles_of(self, pipeline_rank: int) -> list[PlannedRole]:
        """The roles of which a pipeline rank has stages, with these."""
        ranks, found = self.config.parallel.pipeline, []
        for role in self._roles:
            last = role.size.place == "last"
            mine = role.stages[pipeline_rank::ranks] if not last else role.stages * (pipeline_rank == ranks - 1)
            found += [dataclasses.replace(role, stages=mine)] if mine else []
        return found

    @cached_property
    def places(self) -> list[int]:
        """Pipeline ranks of which every other one is a copy that keeps fewer microbatches in flight."""
        seen: dict[tuple[tuple[int, bool, bool], ...], int] = {}
        for rank in range(self.config.parallel.pipeline):
            here = [*self.stages_of(rank), *(stage for role in self.roles_of(rank) for stage in role.stages)]
            kind = tuple((len(stage.layers), stage.first, stage.last) for stage in here)
            seen.setdefault(kind, rank)
        return list(seen.values())

    @cached_property
    def zero(self) -> ZeroPlan:
        """Of every decoder stage's engine."""
        return self._zero(self.config.engine.zero_stage, self.data * self.config.parallel.context)

    @cached_property
    def encoder_engines_zero(self) -> ZeroPlan:
        """Of every encoder's engine, which has every rank."""
        # Encoders are divided over the whole world, whatever the decoder's layout: each rank encodes its share.
        stage = self.config.encoder_engines.zero_stage
        return self._zero(self.config.engine.zero_stage if stage < 0 else stage, self.world)

    def _zero(self, stage: int, ranks: int) -> ZeroPlan:
        engine = self.config.engine
        optimizer, weights = engine.offload_optimizer != "none", engine.offload_parameters != "none"
        # What `engine.encoder_engine` tells DeepSpeed: below the stages that can offload, nothing is.
        return ZeroPlan(stage, ranks, engine.precision == "bf16", optimizer and stage > 0, weights and stage == 3)

    @cached_property
    def trained(self) -> list[int]:
        """Parameters of each engine beside the decoder's: of every trained encoder, and of all trained connectors."""
        # An encoder has an engine of its own, since DeepSpeed counts the backwards of a step for an engine and encoders
        # have different numbers of them. Connectors have one backward each, so that one engine can hold them all.
        config, connectors = self.config, connector_parameters(self.config)
        free = [count for name, count in connectors.items() if not config.encoders[name].connector.frozen]
        encoders = [count for name, count in encoder_parameters(config).items() if not config.encoders[name].frozen]
        return [*encoders, sum(free)] if free else encoders

    @cached_property
    def frozen(self) -> list[int]:
        """Parameters of each encoder that is not trained."""
        config = self.config
        return [count for name, count in encoder_parameters(config).items() if config.encoders[name].frozen]

    @cached_property
    def frozen_connectors(self) -> int:
        """Parameters of the connectors that are not trained, which are whole on every rank."""
        connectors = connector_parameters(self.config).items()
        return sum(count for name, count in connectors if self.config.encoders[name].connector.frozen)
