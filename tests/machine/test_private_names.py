"""Private names of other packages that this one uses. A release that changes one fails here, with the place."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

NAMES = [  # (module, attribute, where it is used)
    ("torch", "_weight_int8pack_mm", "parts/quantize.py: decoding with int8 weights"),
    ("torch", "_foreach_lerp_", "training/parameters.py: the average of the weights"),
    ("torch", "_foreach_mul_", "training/loop.py: clipping"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo", "training/checkpoint.py: reading .metadata"),
    ("torchmetrics.image.fid", "_compute_fid", "evaluation/benchmarks/distances.py: FID of stored statistics"),
    ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup._init_mp_dtypes", "training/parallel.py"),
    ("torch.distributed.fsdp", "FSDPModule._get_fsdp_state", "training/parallel.py: gradient dtypes of groups"),
]


@pytest.mark.parametrize(("module", "attribute", "place"), NAMES, ids=lambda value: str(value).split(":")[0])
def test_a_private_name_is_still_there(module, attribute, place):
    found = importlib.import_module(module)
    for name in attribute.split("."):
        assert hasattr(found, name), f"{module}.{attribute} is gone (torch {torch.__version__}): {place}"
        found = getattr(found, name)


def test_the_state_of_a_sharded_module_lists_its_groups():
    from torch.distributed.fsdp._fully_shard import _fsdp_state

    assert "_fsdp_param_groups" in inspect.getsource(_fsdp_state), "training/parallel.py: settle"
