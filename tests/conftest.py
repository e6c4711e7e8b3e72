"""Tests share a machine, several at a time: one torch thread each."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["interpreter", "cuda"])
def triton_kernels(request):
    """`name -> (module of Triton kernels, device that it runs on)`: a GPU, or NumPy in its place."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield lambda name: (importlib.import_module(name), torch.device("cuda"))
        return

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Decorators decide what interprets a function, those of Triton's own library too: everything is loaded anew.
        for name in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
            patch.delitem(sys.modules, name)

        def interpreted(name):
            package, _, own_name = name.rpartition(".")
            path = Path(importlib.import_module(package).__file__).with_name(f"{own_name}.py")
            spec = importlib.util.spec_from_file_location(f"interpreted_{own_name}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, torch.device("cpu")

        yield interpreted
