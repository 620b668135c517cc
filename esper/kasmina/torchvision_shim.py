"""torchvision beside a CPU build of torch: its compiled operators do not load there, and its import asks for two."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive: list[torch.library.Library] = []


@lru_cache(maxsize=1)
def import_torchvision() -> ModuleType:
    """Return torchvision; every import of it goes through here.

    A torchvision built for CUDA cannot load its operators beside a torch built without; blocks, data sets and
    transforms need none of them. Their schemas are declared only after the import has failed for want of them: where
    the operators do load, a second declaration would end the process.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _MISSING_SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _kept_alive.append(library)
    return importlib.import_module("torchvision")
