"""How a layer without gradients is computed: backend, form of the weights, and images at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spigan.ops import backends, plans
from spigan.ops.convolution import allows_tf32, result_size
from spigan.ops.frozen_layer import GPU_PART_BYTES, frozen_modulated_conv2d
from spigan.ops.layer_end import LayerEnd
from spigan.ops.layer_weights import LayerWeight, possible_forms, weight_form

CACHED_PART_BYTES = 1 << 25
"""A temporary result that stays in the L2 cache of a large GPU, so that the pass after it need not read memory."""


@dataclass(frozen=True)
class LayerPlan:
    """One way to compute a layer; see `frozen_modulated_conv2d`."""

    backend: str
    form: str
    part_bytes: int = GPU_PART_BYTES

    def __str__(self) -> str:
        parts = "" if self.part_bytes == GPU_PART_BYTES else f" {self.part_bytes >> 20} MiB at a time"
        return f"{self.backend} {self.form}{parts}"


Pack = Callable[[LayerPlan], LayerWeight]
"""Returns the weights of the layer in the form of a plan."""


@dataclass(kw_only=True)
class LayerCall:
    """A call of `frozen_modulated_conv2d`, without its plan and weights.

    Attributes:
        x, end, style, up, padding, filter, keep: Arguments of `frozen_modulated_conv2d`.
        shape: [O, I, k, k] of the weights.
        kept: Whether later calls will use the packed weights again.
    """

    x: Tensor
    end: LayerEnd
    style: Tensor | None
    up: int
    padding: int
    filter: Tensor
    shape: torch.Size
    keep: bool = True
    kept: bool = False

    def run(self, plan: LayerPlan, weight: LayerWeight) -> tuple[Tensor | None, Tensor | None]:
        """Return the results of `frozen_modulated_conv2d`."""
        return frozen_modulated_conv2d(
            plan.backend, self.x, weight, self.end, style=self.style, up=self.up, padding=self.padding,
            filter=self.filter, keep=self.keep, part_bytes=plan.part_bytes,
        )  # fmt: skip

    @property
    def most_images(self) -> int:
        """The next power of two to the number of images, up to which batches share a plan.

        A plan for each number would cost more than it gains.
        """
        return 1 << (self.x.shape[0] - 1).bit_length()

    @property
    def size(self) -> tuple[int, int]:
        """(H', W') of the result."""
        _, height, width, _ = self.x.shape
        return result_size(height, width, self.shape[-1], self.up, self.padding)

    @property
    def signature(self) -> tuple[object, ...]:
        """What a plan depends on, except the backend."""
        x, rgb = self.x, self.end.rgb_weight
        return (
            x.device, x.shape, _precision(x), self.shape, self.up, self.padding, self.filter.shape, self.keep,
            self.kept, self.style is None, rgb is None,
        )  # fmt: skip

    def key(self, names: tuple[str, ...]) -> str:
        """Return the name of the layer in the list of plans.

        Args:
            names: backends that may run it.
        """
        (_, height, width, channels_in), channels_out, kernel = self.x.shape, self.shape[0], self.shape[-1]
        parts = [
            f"layer of up to {self.most_images} images, {channels_in} x {height} x {width}",
            f"{kernel}x{kernel} to {channels_out} x {self.size[0]} x {self.size[1]}",
            _precision(self.x),
            f"FIR of {self.filter.shape[-1]} taps" if self.up == 2 else "",
            "styled" if self.style is not None else "",
            "" if self.end.rgb_weight is None else ("with RGB" if self.keep else "only RGB"),
            "" if self.kept else "weights not kept",
            "/".join(names),
        ]
        return ", ".join(filter(None, parts))


def _precision(x: Tensor) -> str:
    return "TF32" if allows_tf32(x) else str(x.dtype).removeprefix("torch.")


def layer_plan(backend: str, call: LayerCall, pack: Pack, *, others: bool = False) -> LayerPlan:
    """Return how to compute a layer: the fixed choice, or the fastest way if `plans.measures` says so.

    Args:
        backend: "cpp", "triton" or "cuda".
        call: The layer.
        pack: Packs its weights.
        others: Whether other backends may run it, because "auto" has chosen `backend`.
    """
    if not plans.measures(call.x.device, call.kept):
        return _fixed_plan(backend, call)
    if backend == "cpp":  # where the values of the filter matter too
        return _measured_plan(backend, call, pack, others) or _fixed_plan(backend, call)
    # The host should launch the next layer before a GPU has finished this one.
    signature = (backend, others, call.signature)
    if (known := plans.decisions.get(signature)) is None:
        if (known := _measured_plan(backend, call, pack, others)) is None:
            return _fixed_plan(backend, call)
        plans.decisions[signature] = known
    return known


def _fixed_plan(backend: str, call: LayerCall) -> LayerPlan:
    arguments = (call.shape, call.size, call.x.dtype, call.x.shape[0], call.up, call.padding, call.filter, call.kept)
    return LayerPlan(backend, weight_form(backend, *arguments))


def _measured_plan(backend: str, call: LayerCall, pack: Pack, others: bool) -> LayerPlan | None:
    """Return the fastest plan, or None if it is not known and cannot be measured now."""
    fixed = _fixed_plan(backend, call)
    if call.x.shape[0] == 0:
        return fixed
    names = (backend, *(_other_backends(backend, call.x.device) if others else ()))
    candidates = {str(plan): plan for plan in (fixed, *_alternatives(names, call))}
    if len(candidates) == 1:
        return fixed
    prepared = {name: partial(_prepared, plan, call, pack) for name, plan in candidates.items()}
    chosen = plans.choose(call.key(names), call.x.device, prepared)
    return None if chosen is None else candidates[chosen]


def _other_backends(backend: str, device: torch.device) -> list[str]:
    candidates = [name for name in ("cuda", "triton") if name != backend]
    return [name for name in candidates if backends.why_unavailable("modulated_conv2d", name, device) is None]


def _alternatives(names: tuple[str, ...], call: LayerCall) -> list[LayerPlan]:
    """Return all ways to compute the layer for any number of images that shares its plan."""
    found = []
    image_bytes = call.size[0] * call.size[1] * call.shape[0] * call.x.dtype.itemsize
    for backend in names:
        for form in possible_forms(backend, call.shape, call.x.dtype, call.up, call.padding, call.filter):
            if backend == "triton" and form != "taps" and "cuda" in names:
                continue  # the library's convolution is a candidate already, with the faster pass after it
            found.append(LayerPlan(backend, form))
            temporary = (call.up == 2 or not call.keep) and (form != "taps" or call.up == 2)
            if backend != "cpp" and temporary and call.most_images * image_bytes > CACHED_PART_BYTES:
                found.append(LayerPlan(backend, form, CACHED_PART_BYTES))
    return found


def _prepared(plan: LayerPlan, call: LayerCall, pack: Pack) -> Callable[[], object]:
    """Return the function to time. Packing counts if it is repeated in each call."""
    if not call.kept:
        return lambda: call.run(plan, pack(plan))
    return partial(call.run, plan, pack(plan))
