"""A plugin that adds one of each kind: a modality with its encoder, two connectors, a data task and an objective.

    python -m megatron_gemini.train --plugin tests.extension.plugin --config ...

Nothing of it is in the package. docs/extending.md walks through these files.
"""

from __future__ import annotations

from megatron_gemini.registry import CONNECTORS, ENCODERS, MODALITIES, OBJECTIVES
from tests.extension.halving import HALVING
from tests.extension.reading import READING
from tests.extension.scored import SCORED
from tests.extension.series import SERIES, SERIES_ENCODER

ENCODERS.register("series", SERIES_ENCODER)
MODALITIES.register("series", SERIES)
CONNECTORS.register("halving", HALVING)
CONNECTORS.register("reading", READING)
OBJECTIVES.register("scored", SCORED)
