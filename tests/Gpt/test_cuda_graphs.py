"""Replays are the function itself: on a GPU where there is one, and with a stand-in for graphs on a CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from Gpt import cuda_graphs, training
from Gpt.checkpoint import CheckpointFolder
from Gpt.conditions import Conditions
from Gpt.cuda_graphs import Graphed, GraphedGradient
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.distillation import DistillationConfig, distillation
from Gpt.generator import Batch
from Gpt.models.gpt import Gpt, GptConfig
from Gpt.models.paper_generator import PaperConfig, PaperGpt
from Gpt.networks import MLP
from Gpt.population.functional import stack_initial
from Gpt.report.logger import Loggers
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.tasks import get_task
from Gpt.training import TrainerConfig


class StandIn:
    """Runs the recorded work again and puts what it gives, gradients too, where a graph would."""

    parameters = []

    def __init__(self, work):
        self.work, self.result = work, work()
        self.gradients = [p.grad for p in self.parameters]

    def replay(self):
        self.result.copy_(self.work())
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None:
                gradient.copy_(p.grad)


@pytest.fixture(params=["stand-in", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return torch.device("cuda")

    def record(work, device, rng=None):
        graph = StandIn(work)
        return graph, graph.result

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(cuda_graphs, "_recordable", lambda x: not torch.is_grad_enabled())
    return torch.device("cpu")


def layer(device):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2).to(device)


@torch.no_grad()
def test_replays_follow_their_inputs_shapes_precision_and_weights(device):
    net = layer(device)
    graphed = Graphed(lambda x, y: net(x) * y, net)
    noise = rng(device, 0, "inputs")
    results, expected = [], []
    for rows, mixed in ((4, False), (4, False), (5, False), (4, True), (4, False)):
        x, y = (torch.randn(rows, n, generator=noise, device=device) for n in (3, 2))
        net.weight.mul_(1.5)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            results.append(graphed(x, y))
            expected.append(net(x) * y)
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(graphed._recorded) == 3
    net.weight.data = torch.ones_like(net.weight)  # other memory
    torch.testing.assert_close(graphed(x, y), net(x) * y)
    assert len(graphed._recorded) == 1


def test_a_copy_reads_its_own_weights(device):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(device)
            self.graphed = Graphed(self.double, self.layer)

        def double(self, x):
            return 2 * self.layer(x)

    first, x = Net(), torch.ones(1, 3, device=device)
    with torch.no_grad():
        before = first.graphed(x)
        second = copy.deepcopy(first)
        second.layer.weight.zero_()
        torch.testing.assert_close(second.graphed(x), 2 * second.layer.bias[None])
        torch.testing.assert_close(first.graphed(x), before)


def test_gradients_and_counters_see_the_function_itself():
    net, x = layer("cpu"), torch.ones(1, 3)
    graphed = Graphed(net, net)
    graphed(x).sum().backward()
    assert net.weight.grad is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graphed(x)
    assert counter.get_total_flops() == 12


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("with_start", [True, False])
def test_the_gradient_is_that_of_the_loss_with_the_same_draws(device, with_start, with_masks, monkeypatch):
    net = layer(device)
    monkeypatch.setattr(StandIn, "parameters", [*net.parameters()])
    unused = nn.Parameter(torch.zeros(1, device=device))

    def loss(batch, rng):
        x = batch.target if batch.start is None else batch.target + batch.start
        if batch.masks is not None:
            x = x * batch.masks
        noise = torch.randn(x.shape, generator=rng, device=x.device)
        return (net(x + noise) * batch.prompt["mask"]).square().mean()

    graphed = GraphedGradient(loss, [*net.parameters(), unused])
    for step in range(3):
        draw = rng(device, 0, "batch", step)
        target, start = (torch.randn(4, 3, generator=draw, device=device) for _ in range(2))
        batch = Batch(target, start if with_start else None, {"mask": torch.rand(4, 2, generator=draw, device=device)})
        batch.masks = torch.rand(4, 3, generator=draw, device=device) if with_masks else None
        again = torch.Generator(device)
        again.set_state(draw.get_state())
        value = graphed(batch, draw).clone()
        gradient = net.weight.grad.clone()
        net.zero_grad(set_to_none=True)
        expected = loss(batch, again)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, net.weight)[0])
        assert unused.grad is None
        with torch.no_grad():
            net.weight.sub_(0.1 * gradient)


def test_another_phase_is_recorded_anew(device, monkeypatch):
    net = layer(device)
    monkeypatch.setattr(StandIn, "parameters", [*net.parameters()])
    target = torch.ones(4, 3, device=device)

    def phase(batch):
        return int(batch.progress >= 0.5)

    graphed = GraphedGradient(
        lambda batch, rng: net(batch.target).sum() * (1 + phase(batch)), [*net.parameters()], phase
    )
    for progress in (0.0, 0.4, 0.5, 0.9):
        graphed(Batch(target, progress=progress), rng(device, 0))
        expected = torch.full_like(net.weight, 4.0 if progress < 0.5 else 8.0)
        torch.testing.assert_close(net.weight.grad, expected)


STRUCTURE = Structure.of(MLP(6, 5, 3), MLP.symmetry)


def generator(kind, device):
    """A generator none of whose weights is zero."""
    conditions = Conditions({"target_metric": 2}, 16, 0.0)
    if kind is Gpt:
        made = Gpt(STRUCTURE, conditions, FlowMatching(), GptConfig(width=16, depth=2, heads=2))
    else:
        config = PaperConfig(width=16, layers=2, heads=2, chunk=5, weight_scale=2.0, steps=5)
        made = PaperGpt(STRUCTURE, conditions, DDPM(), config)
    for i, parameter in enumerate(made.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=rng("cpu", 0, "parameter", i))
    return made.to(device)


class GraphedOnCpu(training.Backward):
    """Asks for a graph where the loop would not: the stand-in's."""

    def __init__(self, generator, config, device):
        super().__init__(generator, config, device)
        if generator.graphs:
            self._graphed = GraphedGradient(self._mixed, list(generator.parameters()))


def draw(count, noise):
    start, target = (torch.randn(count, STRUCTURE.size, generator=noise, device=noise.device) for _ in range(2))
    return Batch(target, start, {"target_metric": torch.rand(count, 2, generator=noise, device=noise.device)})


@pytest.mark.parametrize("kind", [Gpt, PaperGpt])
@pytest.mark.parametrize("mixed", [False, True])
def test_samples_are_those_of_the_eager_generator(device, kind, mixed):
    made = generator(kind, device).eval()
    made.mixed_precision = mixed
    for count in (3, 2, 3):
        given = draw(count, rng(device, 0, "given", count))
        made.graphs = False
        expected = made.sample(given.prompt, given.start, seed=count)
        made.graphs = True
        assert torch.allclose(made.sample(given.prompt, given.start, seed=count), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(made).sample(given.prompt, given.start, seed=count), expected)


@pytest.mark.parametrize("kind", [Gpt, PaperGpt])
def test_training_is_that_of_the_eager_loop(device, kind, monkeypatch, tmp_path):
    config = TrainerConfig(steps=4, batch_size=8, muon_learning_rate=0.02, learning_rate=0.01, validate_every=0)
    trained = []
    for graphs in (False, True):
        made = generator(kind, device)
        made.graphs = graphs
        monkeypatch.setattr(StandIn, "parameters", [p for p in made.parameters() if graphs])
        if device.type == "cpu":
            monkeypatch.setattr(training, "Backward", GraphedOnCpu)
        checkpoints, score = CheckpointFolder(tmp_path / str(graphs), {}), lambda generator: {"score": 0.0}
        training.train(made, draw, draw, score, config, checkpoints, Loggers([]), device, seed=0)
        trained.append(made.state_dict())
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, rtol=1e-4, atol=1e-5)


class Unrecordable(TorchDispatchMode):
    """Lists what a CUDA graph cannot record: values read back, and tensors made from values of the host."""

    REFUSED = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function.name() == "aten::index.Tensor" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or function.name() in self.REFUSED:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


REFUSED = [lambda x: x * torch.tensor([2.0]), lambda x: x * x.sum().item(), lambda x: x[x > 0]]


@pytest.mark.parametrize("operation", REFUSED, ids=["from the host", "to the host", "as many as there are"])
def test_what_cannot_be_recorded_is_found_without_a_gpu(operation):
    with Unrecordable() as unrecordable:
        operation(torch.ones(1))
    assert len(unrecordable.found) == 1


@pytest.mark.parametrize("name", ["digits_loss", "digits_deep_loss", "digits_mask", "cartpole"])
def test_steps_with_behaviour_can_be_recorded(name):
    """Warm-ups may fetch data and keep it; after them a step works on the device alone."""
    task = get_task(name)
    term = DistillationConfig(weight=1.0, loss_weight=0.0 if name == "cartpole" else 1.0, examples=4)
    made = Gpt(task.structure, Conditions({"target_metric": 2}, 16, 0.1), FlowMatching(), GptConfig(16, 2, 2))
    made.distillation = distillation(task, term)
    networks = stack_initial(task.constructor, task.structure, [*range(8)])
    batch = Batch(networks[4:], networks[:4], {"target_metric": torch.rand(4, 2, generator=rng("cpu", 0))})
    batch.masks = torch.ones(4, 10) if name == "digits_mask" else None
    draws = rng("cpu", 1)
    for _ in range(cuda_graphs.WARM_UPS):
        made.loss(batch, draws).backward()
    with Unrecordable() as unrecordable:
        made.loss(batch, draws).backward()
    assert unrecordable.found == []
