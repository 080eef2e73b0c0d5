"""What a run reads before it quantizes: every weight once, and its calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.sample import sample_sequences
from d2qconv.calibrate.tokens import CalibrationTokens, bos_token, describe_tokens, load_tokens
from d2qconv.checkpoint.digest import content_digest
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.ir.workdir import read_tokens, write_tokens
from d2qconv.progress import Watch
from d2qconv.run import CalibrationSpec
from d2qconv.team import Team
from d2qconv.timing import timed

#: Added to the seed of the calibration for the sequences of the last pass.
OWN_SEED = 1 << 32


@dataclass(frozen=True)
class Source:
    """A checkpoint, the model that it holds, and the device that samples from it. folder: the work directory."""

    checkpoint: Checkpoint
    model: ModelDesc
    device: torch.device
    folder: Path


def read_weights(source: Source, watch: Watch) -> str:
    """Read every weight of the checkpoint once; returns the SHA-256 over the config and all of them, hex.

    A damaged or not finite weight is an error now, not hours later in its block. The digest tells a resumed run
    that it is about the same model, wherever that lies.
    """
    tensors = source.model.tensors
    watch.stage("read", len(tensors))
    with timed("read"):
        return content_digest(source.checkpoint.config, tensors, watch.step)


def calibration_tokens(
    source: Source, spec: CalibrationSpec, n_own: int, content: str, team: Team, watch: Watch
) -> CalibrationTokens:
    """The calibration tokens, the leader's on every process, with n_own sequences for the last pass."""
    made: list[CalibrationTokens] = []

    def describe() -> tuple[str, tuple[str, ...]]:
        made.append(_leaders(source, spec, n_own, content, watch))
        return made[0].description, made[0].warnings

    description, warnings = team.from_leader(describe)
    sent = team.tensors_from_leader(lambda: _arrays(made[0]), "cpu")
    return CalibrationTokens(sent["calibration"], sent["held_out"], description, warnings, sent.get("own"))


def _leaders(
    source: Source, spec: CalibrationSpec, n_own: int, content: str, watch: Watch
) -> CalibrationTokens:
    """What is sampled is kept in the work directory, since drawing it again takes long; a text is read again.

    So what is kept depends on the model, on `spec`, and of the tokenizer on the token that begins a text, alone.
    """
    is_sampled = spec.source == "self"
    bos = bos_token(source.checkpoint, source.model)
    key = f"{content} {spec} {n_own} {source.device.type} torch {torch.__version__} begins with {bos}"
    watch.stage("calibrate", spec.length)
    kept = read_tokens(source.folder, key) if is_sampled or n_own else None
    if kept is not None and is_sampled:
        tokens = _kept(kept, spec)
    else:
        tokens = load_tokens(
            spec,
            source.checkpoint,
            source.model,
            device=source.device,
            on_step=lambda done: watch.step(done, f"sampling from {source.checkpoint.name}"),
        )
        if n_own:
            own = _sampled(source, spec, n_own, bos, watch) if kept is None else kept["own"]
            tokens = replace(tokens, own=own)
        if kept is None and (is_sampled or n_own):
            write_tokens(
                source.folder, key, {k: v for k, v in _arrays(tokens).items() if is_sampled or k == "own"}
            )
    watch.step(spec.length, tokens.description)
    for warning in tokens.warnings:
        watch.note(warning)
    return tokens


def _sampled(source: Source, spec: CalibrationSpec, n_own: int, bos: int | None, watch: Watch) -> Tensor:
    return sample_sequences(
        source.model,
        n_own,
        spec.length,
        bos=bos,
        seed=(spec.seed + OWN_SEED) % (1 << 63),
        device=source.device,
        on_token=lambda done: watch.step(done, f"sampling {n_own} sequences for the last pass"),
    )


def _kept(found: Mapping[str, Tensor], spec: CalibrationSpec) -> CalibrationTokens:
    description = describe_tokens(spec, found["calibration"])
    return CalibrationTokens(found["calibration"], found["held_out"], description, own=found.get("own"))


def _arrays(tokens: CalibrationTokens) -> dict[str, Tensor]:
    found = {"calibration": tokens.calibration, "held_out": tokens.held_out}
    return found if tokens.own is None else found | {"own": tokens.own}
