"""The backward of losses whose gradients are made in the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Whether this backward may come a second time, as with retain_graph. torch has no public name for it.
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def scale_gradients(made: Sequence[torch.Tensor | None], scale: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients that the forward made, None for inputs without one, times the gradient `scale` of its loss."""
    # In place, so that a gradient of the weight's size exists once; a copy only if the graph is to be used again.
    again = _keeps_graph()
    return [x if x is None else x * scale if again else x.mul_(scale) for x in made]
