"""Networks written for an evaluation: as many at once as memory takes, shared by the processes, and what one costs.

What a network looks like is a function of the seed, the name of its noise and its number, whatever batch it is written
in: each has a stream of random numbers of its own. Only the draws that a stochastic sampler makes on its way follow the
batches.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.distributed import Rows, busy, from_first, in_chunks
from Gpt.evaluation.costs import Price, count_flops
from Gpt.generator import Generator, Prompt, evaluating
from Gpt.seeds import derive_seed


@dataclass(frozen=True)
class Request:
    """What networks are asked for: a row of every prompt tensor for each, and of starts where the generator needs them.

    Indexing takes some of the rows.
    """

    count: int
    prompt: Prompt = field(default_factory=dict)
    start: Float[Tensor, "count D"] | None = None

    def __getitem__(self, rows: slice) -> "Request":
        prompt = {name: value[rows] for name, value in self.prompt.items()}
        count = len(range(*rows.indices(self.count)))
        return Request(count, prompt, None if self.start is None else self.start[rows])


@dataclass(frozen=True)
class Writer:
    """A generator with its sampling settings; writes `max_batch` networks at once."""

    generator: Generator
    steps: int | None = None
    guidance: float = 1.0
    seed: int = 0
    max_batch: int = 2048

    def __call__(self, request: Request, name: str) -> Float[Tensor, "count D"]:
        """The networks that are asked for; `name` names the noise."""

        def write(chunk: slice) -> Rows:
            return {"weights": self._sample(request[chunk], name, chunk.start).float()}

        with evaluating(self.generator):
            return in_chunks(write, request.count, self.max_batch)["weights"]

    def timed(self, request: Request, name: str) -> tuple[Float[Tensor, "count D"], Price]:
        """The same, and what one of them takes, compilation left out."""
        _wait_for(replace(self, steps=1)(request, name))  # compiles and records what is timed next
        began = time.perf_counter()
        weights = _wait_for(self(request, name))
        seconds = from_first(time.perf_counter() - began) * busy(request.count, self.max_batch) / request.count
        flops, once_flops = (
            from_first(count_flops(partial(writer, request[:1], name)))
            for writer in (self, replace(self, steps=1, guidance=1.0))
        )
        return weights, Price(seconds, flops, once_flops)

    def _sample(self, request: Request, name: str, first: int) -> Float[Tensor, "count D"]:
        """Networks number `first`, `first + 1`, …"""
        generator, prompt = self.generator, request.prompt
        device = next(generator.parameters()).device
        seeds = [derive_seed(self.seed, name, number) for number in range(first, first + request.count)]
        noise, stream = None, torch.Generator(device)
        if generator.sampler == generator.smooth_sampler:
            noise = torch.empty(request.count, *generator.noise_shape, device=device)
            for row, seed in zip(noise, seeds, strict=True):
                row.normal_(generator=stream.manual_seed(seed))
        if generator.identities is not None:
            chosen = [seed % generator.identities.num_embeddings for seed in seeds]
            prompt = prompt | {"identity": torch.tensor(chosen, device=device)}
        return generator.sample(
            prompt,
            request.start,
            count=request.count,
            steps=self.steps,
            guidance=self.guidance,
            seed=derive_seed(self.seed, name, first),
            noise=noise,
        )


def _wait_for(weights: Tensor) -> Tensor:
    """The same, when the device has finished them."""
    weights.sum().item()
    return weights
