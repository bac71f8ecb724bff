"""A plugin that adds one of each kind: a modality with its encoder, two connectors, an objective, a data task, a file
format and a metric.

    python -m megatron_gemini.train --plugin tests.extension.plugin --config ...

Nothing of it is in the package. docs/extending.md walks through these files.
"""

from __future__ import annotations

from megatron_gemini.registry import CONNECTORS, ENCODERS, FORMATS, METRICS, MODALITIES, OBJECTIVES, TASKS
from tests.extension.comma_separated import CSV
from tests.extension.first_word import FIRST_WORD
from tests.extension.halving import HALVING
from tests.extension.naming import NAMING
from tests.extension.reading import READING
from tests.extension.scored import SCORED
from tests.extension.series import SERIES, SERIES_ENCODER

ENCODERS.register("series", SERIES_ENCODER)
MODALITIES.register("series", SERIES)
CONNECTORS.register("halving", HALVING)
CONNECTORS.register("reading", READING)
OBJECTIVES.register("scored", SCORED)
TASKS.register("name_series", NAMING)
FORMATS.register("csv", CSV)
METRICS.register("first_word", FIRST_WORD)
