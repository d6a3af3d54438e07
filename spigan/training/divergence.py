"""Divergence: the error that ends a run, and the text that says which number went wrong and what to change."""

from __future__ import annotations


class Diverged(FloatingPointError):
    """Training has diverged; the message says where, and what to change."""


_SUSPECTS = {  # names recorded in an update: (the update, what to change)
    ("loss_d", "real_logit", "fake_logit", "real_sign", "grad_norm_d"): (
        "the discriminator's step",
        "lower lr_d, raise r1_gamma",
    ),
    ("r1", "grad_norm_r1"): ("the discriminator's R1 step", "lower lr_d or r1_gamma"),
    ("loss_g", "grad_norm_g"): ("the generator's step", "lower lr_g"),
    ("path_length", "path_length_penalty", "grad_norm_pl"): ("the path-length step", "lower pl_weight or lr_g"),
}


def divergence(what: str, value: float | None, iteration: int, kimg: float, limit: float | None, bf16: bool) -> str:
    """Describe a divergence: which number, where, and what to change.

    Args:
        what: name of a statistic, or another description.
        value: its value, if it is a single number.
        iteration: when it was recorded.
        kimg: thousands of images seen before.
        limit: the limit that it exceeds; None if it is not finite.
        bf16: whether convolutions run in bfloat16.
    """
    step, advice = next(
        (suspect for names, suspect in _SUSPECTS.items() if what in names), ("the last steps", "lower lr_g and lr_d")
    )
    too_much = "not finite" if limit is None else f"above grad_norm_limit = {limit:g}"
    value_text = "" if value is None else f" ({value:g})"
    precision = ", or set precision to fp32" if bf16 else ""
    return (
        f"training has diverged: {what}{value_text} is {too_much} at iteration {iteration} ({kimg:g} kimg), in {step}. "
        f"Advice: {advice}{precision}"
    )
