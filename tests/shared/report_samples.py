"""A report of a run that never was."""

from __future__ import annotations

import hashlib

from d2qconv.report.schema import (
    VERSION,
    BlockEntry,
    Environment,
    FileEntry,
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
