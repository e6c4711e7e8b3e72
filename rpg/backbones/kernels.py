"""CUDA kernels of optional packages: used where they import, done without where they do not.

Nothing is imported before the first CUDA tensor asks for it: several of these packages fail to import, or fail only
when called, on machines without a GPU.
"""

import functools
import importlib
import logging
import warnings
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


@functools.cache
def load(path: str) -> Callable | None:
    """The function at the dotted `path`, or None if its package is missing or broken here; logs once which."""
    module, name = path.rsplit(".", 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # what a package warns of while it is imported does not break it
            kernel = getattr(importlib.import_module(module), name)
    except Exception as error:  # half-built extensions raise anything, OSError and AttributeError included
        logger.info("%s is not available (%s); using the PyTorch implementation", path, error)
        return None
    logger.info("using %s", path)
    return kernel


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take `dtype`; float64 is left to PyTorch."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)
