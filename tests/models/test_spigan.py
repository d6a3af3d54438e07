"""SPIGAN as a whole: its images, compiled and exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan import SPIGAN, ModelConfig
from spigan.ops import use_backend

TINY = {"resolution": 8, "img_channels": 1, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}


def make(seed: int = 0, **changes: Any) -> SPIGAN:
    torch.manual_seed(seed)
    return SPIGAN(ModelConfig.model_validate(TINY | changes)).eval()


def noise(model: SPIGAN, n: int = 3) -> Tensor:
    return torch.randn(n, *model.config.z_shape, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("mapping", ["ode", "mlp"])
def test_shapes(mapping: str) -> None:
    model = make(mapping=mapping, img_channels=3)
    z = noise(model)
    assert z.shape[1:] == ((16,) if mapping == "mlp" else (3, 8, 8))
    image = model(z)
    assert image.shape == (3, 3, 8, 8)
    assert torch.equal(model(z, [1.0]), image[None])
    assert torch.equal(model.generator(model.mapping(z)), image)


def test_list_of_times() -> None:
    model = make()
    z = noise(model)
    images = model(z, t=[0.5, 1.0])
    assert images.shape == (2, 3, 1, 8, 8)
    torch.testing.assert_close(images[0], model(z, 0.5))
    torch.testing.assert_close(images[1], model(z))
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_noise_follows_the_mode_unless_given() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.5)
    z = noise(model)
    assert torch.equal(model(z), model(z, noise="const"))
    model.train()
    assert not torch.equal(model(z), model(z))
    assert torch.equal(model(z, noise="none"), model(z, noise="none"))


# ---- The analytic path ----


@pytest.mark.parametrize("changes", [{}, {"path_latent": "t"}, {"mapping": "mlp"}])
def test_analytic_path_begins_with_z_to_the_bit(changes: dict[str, Any]) -> None:
    model = make(path="analytic", **changes)
    z = noise(model)
    assert z.shape == (3, 1, 8, 8)
    assert torch.equal(model(z, 0.0), z) and torch.equal(model(z, [0.0, 1.0])[0], z)
    clean = model.generator(model.mapping(z))
    assert torch.equal(model(z), clean) and torch.equal(model(z, [1.0]), clean[None])
    halfway = clean if changes != {"path_latent": "t"} else model.generator(model.mapping(z, 0.25))
    torch.testing.assert_close(model(z, 0.25), 0.25 * halfway + 0.75 * z, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(z, [0.5, 0.25])[1], model(z, 0.25))
    for t in (1.5, [0.5, -0.1], []):
        with pytest.raises(ValueError, match=r"t must be a time in \[0, 1\]"):
            model(z, t)


@pytest.mark.parametrize(("latent", "evaluations"), [("1", 3), ("t", 9)])
def test_evaluations_on_the_analytic_path(latent: str, evaluations: int) -> None:
    """One evaluation gives an image; with h(1) alone, it gives those of all times."""
    model = make(path="analytic", path_latent=latent)
    sizes: list[int] = []
    model.generator.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    model(noise(model), [0.0, 0.5, 1.0])
    assert sizes == [evaluations]
    model(noise(model), 0.5)
    assert sizes[1:] == [3]


def test_models_without_a_path_are_learned(tmp_path: Path) -> None:
    """Those saved before there was a choice make the images that they made."""
    model = make()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("path", "path_latent", "time_init"):
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded, z = SPIGAN.from_pretrained(tmp_path), noise(model)
    assert loaded.config.path == "learned"
    assert torch.equal(loaded(z, [0.0, 0.5, 1.0]), model(z, [0.0, 0.5, 1.0]))
    assert torch.equal(loaded(z, 0.5), loaded.generator(loaded.mapping(z, 0.5)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 3, 8, 8), (2, 1, 16, 16), (2, 16)])
def test_noise_of_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"z must have shape [N, 1, 8, 8], got {list(shape)}")):
        make()(torch.randn(shape))


# ---- Compilers ----


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """What other tests compiled does not count, nor what this one compiles."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("changes", "t"),
    [
        ({}, 1.0),
        ({}, [0.5, 1.0]),
        ({"mapping": "mlp"}, 1.0),
        ({"path": "analytic"}, [0.5, 1.0]),
        ({"img_channels": 3, "ode_solver": "euler", "conv_clamp": 256.0}, 0.5),
    ],
)
def test_compiles_without_graph_breaks(changes: dict[str, Any], t: Any) -> None:
    model = make(**changes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z = noise(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, t=t), model(z, t=t))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled_gradients(backend: str) -> None:
    model = make().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z = noise(model)
    gradients = []
    with use_backend(backend):
        for network in (model, compiled):
            loss = network(z, noise="const").square().mean()
            gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_inductor() -> None:
    model = make().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True)
    for n in (3, 5, 1):  # the second size makes the first graph's batch dynamic
        z = noise(model, n)
        torch.testing.assert_close(compiled(z), model(z), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_exports_with_any_batch_size() -> None:
    model = make()
    program = torch.export.export(model, (noise(model),), dynamic_shapes=({0: torch.export.Dim("N", min=1, max=64)},))
    for n in (1, 5):
        z = noise(model, n)
        torch.testing.assert_close(program.module()(z), model(z))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.slow
def test_exports_kernels_as_they_are_and_references_as_plain_operators(backend: str) -> None:
    model = make().requires_grad_(False)
    z = noise(model)
    with use_backend(backend):
        program = torch.export.export(model, (z,)).run_decompositions({})
    operators = {str(node.target).partition(".default")[0] for node in program.graph.nodes}
    kernels = {name for name in operators if name.startswith("spigan.")}
    assert kernels == (
        {"spigan.rk4_mlp", "spigan.modulated_conv2d", "spigan.fir_bias_act"} if backend == "auto" else set()
    )
    torch.testing.assert_close(program.module()(z), model(z))
