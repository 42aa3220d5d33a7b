"""How often the processes of a run wait for each other in a step."""

import pytest
import torch.distributed as dist

from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training.recipe import Limits
from tests.support import tiny


@pytest.mark.parametrize("rows", [1, 3])
def test_as_many_collectives_a_step_however_many_rows_it_has(rows, tmp_path, monkeypatch):
    """The loaders' state, counts, losses, the gradient's norm, the log, requests to stop; and the sum of gradients."""
    counts = {"all_reduce": 0, "all_gather_object": 0, "steps": []}
    for name in ("all_reduce", "all_gather_object"):
        real = getattr(dist, name)

        def counted(*args, _real=real, _name=name, **more):
            counts[_name] += 1
            return _real(*args, **more)

        monkeypatch.setattr(dist, name, counted)
    tick = loop.Clock.tick

    def ticked(clock):
        counts["steps"].append((counts["all_reduce"], counts["all_gather_object"]))
        tick(clock)

    monkeypatch.setattr(loop.Clock, "tick", ticked)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        recipe = tiny.recipe(steps=4, limits=Limits(192, 16, rows), checkpoint_every=100)
        loop.train(recipe, tmp_path / "run", stage_sources, "cpu", show=False)
    finally:
        dist.destroy_process_group()
    between = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(counts["steps"], counts["steps"][1:])]
    assert between == [(7, 0)] * 3
