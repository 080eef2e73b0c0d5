"""Reports of runs that never were."""

from __future__ import annotations

import hashlib

import msgspec

from d2qconv.report.schema import (
    VERSION,
    AllocationEntry,
    BlockEntry,
    Contribution,
    Environment,
    FileEntry,
    FoldEntry,
    LastPassEntry,
    MemoryEntry,
    PackageEntry,
    Quality,
    Report,
    SourceEntry,
    Spread,
    TensorEntry,
)


def sample(name: str, n_bytes: int, kld: float, *, content: bytes = b"") -> Report:
    """One block of one matrix. content: of the package's only file."""
    file = FileEntry(name, n_bytes, hashlib.sha256(content).hexdigest())
    tensor = TensorEntry(
        "blk.0.q.weight", "q", "weight", 0, "q", [4, 4], "q2_k", 8, 8, 4.0, 0.25, 0.125, None, ""
    )
    return Report(
        report=VERSION,
        digest="",
        package=PackageEntry("fake", name, False, "fakery", n_bytes, 8, 8, [file], ["fake.cpp"], [], {}),
        also=[],
        source=SourceEntry("m", "", "mit", "llama", 16, "s" * 64),
        bits_per_weight=4.0,
        carrier="none",
        carrier_note="",
        warnings=[],
        quality=Quality(
            kld, None, 10.0, 11.0, 0.75, 3, "h" * 64, Spread({"50": kld}, [0.01, 0.1, 1.0], [1, 2])
        ),
        contribution=None,
        blocks=[BlockEntry(0, 0.25, 1.5, 8, 4.0, None)],
        tensors=[tensor],
        folds=[],
        allocation=None,
        last_pass="",
        last_pass_notes=None,
        calibration="none",
        tokens_sha256="t" * 64,
        recipe="nearest",
        options={"recipe": {"polish": 2}},
        command=["d2qconv"],
        fingerprint="f" * 64,
        memory=[MemoryEntry("host", 100, "sweep", {"weights": 100}, 90, None)],
        activations="host",
        stages={"quantize": 1.5},
        seconds=2.0,
        resumed_blocks=0,
        environment=Environment({"d2qconv": "0"}, "Linux", "cpu", 1, 1),
    )


def whole() -> Report:
    """A sample with everything in it that may be missing."""
    report = sample("m.gguf", 1000, 0.5)
    note = LastPassEntry(6, True, "", 0.5, 0.25, 0.5, 0.375)
    return msgspec.structs.replace(
        report,
        contribution=Contribution(0.125, [0.25], -0.125, 0.25, 0.5, 512),
        folds=[FoldEntry("mean_shift", 0, "bias", 0.0, "of the norm", 0.5)],
        allocation=AllocationEntry("--bpw 2", 100, 0.375, 64, [(4, 0.75), (8, 0.375)]),
        last_pass="6 steps",
        last_pass_notes=note,
        blocks=[msgspec.structs.replace(report.blocks[0], last_pass=note)],
        also=[report.package],
        warnings=["mind the gap"],
    )


def large(n_blocks: int = 3) -> Report:
    """Every matrix of several blocks, embedding and norms; `whole` otherwise."""
    report = whole()
    (block,), (tensor,) = report.blocks, report.tensors
    tensors = [
        msgspec.structs.replace(tensor, id=f"blk.{k}.{role}.weight", role=role, block=k, kld=0.125)
        for k in range(n_blocks)
        for role in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    norm = msgspec.structs.replace(
        tensor, id="norm.weight", role="norm", block=None, shape=[4], weight_error=None, output_error=None
    )
    embedding = msgspec.structs.replace(tensor, id="embed.weight", role="embed", block=None, written=None)
    return msgspec.structs.replace(
        report,
        contribution=Contribution(0.125, [0.25] * n_blocks, -0.125, None, 0.5, 512),
        blocks=[msgspec.structs.replace(block, index=k, error=0.25 * k) for k in range(n_blocks)],
        tensors=[embedding, *tensors, norm],
        resumed_blocks=n_blocks - 1,
        stages={"read": 0.5, "quantize": 100.0},
    )
