"""Tests share a machine, several at a time: one torch thread each."""

import contextlib
import importlib
import importlib.util
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C reaches the tests and the processes that they start, also where a shell has it ignored, as it does for
    what it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def outputs_of():
    """`(processes, seconds) -> what each of them printed`, once all have ended; afterwards none is left, which would
    wait for a partner that has gone."""

    def wait(children: list[subprocess.Popen], seconds: int) -> list[str]:
        try:
            return [child.communicate(timeout=seconds)[0] for child in children]
        finally:
            for child in children:
                child.kill()

    return wait


@pytest.fixture(scope="session", params=["interpreter", "cuda"])
def triton_kernels(request):
    """`name -> (module of Triton kernels, device that it runs on)`: a GPU, or NumPy in its place."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return lambda name: (importlib.import_module(name), torch.device("cuda"))

    interpreting: dict = {}

    def interpreted(name):
        package, _, own_name = name.rpartition(".")
        path = Path(importlib.import_module(package).__file__).with_name(f"{own_name}.py")
        spec = importlib.util.spec_from_file_location(f"interpreted_{own_name}", path)
        module = importlib.util.module_from_spec(spec)
        with _another_triton(interpreting), pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            spec.loader.exec_module(module)
        return module, torch.device("cpu")

    return interpreted


@contextlib.contextmanager
def _another_triton(modules):
    """Triton loaded a second time, in `modules`, and out of sight afterwards.

    Decorators decide what interprets a function, those of Triton's own library too.
    """
    usual = _unload_triton()
    sys.modules.update(modules)
    yield
    modules.update(_unload_triton())
    sys.modules.update(usual)


def _unload_triton():
    """Triton's Python modules, which are forgotten; its library can be loaded once only, and stays."""
    names = [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def compiler():
    """Compiled functions from here on, without the tests' checks of shapes, which a compiler cannot look through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler gives many, of its own and of code that it looks into
        jaxtyping.config.update("jaxtyping_disable", True)
        torch._dynamo.utils.counters.clear()  # of compilations: a reset leaves them
        yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


@pytest.fixture
def graph_compiler(compiler, monkeypatch):
    """As `compiler`, for networks of many layers: their graphs are captured and differentiated as for a GPU, but not
    turned into C++, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def encoder_folder(tmp_path) -> Callable[[str, int], Path]:
    """`(name, features, seed=0)`: the folder of a sentence encoder of one random layer, whose words are characters."""
    transformers = pytest.importorskip("transformers")

    def save(name: str, features: int, seed: int = 0) -> Path:
        folder, characters = tmp_path / name, "abcdefghijklmnopqrstuvwxyz0123456789"
        folder.mkdir(parents=True, exist_ok=True)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
        (folder / "vocab.txt").write_text("\n".join(words))
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
        shape = transformers.BertConfig(
            vocab_size=len(words), hidden_size=features, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=64,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformers.BertModel(shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
