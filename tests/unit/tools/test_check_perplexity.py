"""tools/check_perplexity: what it reads of llama-perplexity's output and base file, and what it calls a difference."""

import hashlib
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[3] / "tools" / "check_perplexity"
OUTPUT = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  16.292228 ±   0.913488
Mean PPL(base)                :  15.830417 ±   0.888667
Mean ln(PPL(Q)/PPL(base))     :  -0.028755 ±   0.005230
====== KL divergence statistics ======
Mean    KLD:   0.030333 ±   0.000842
Maximum KLD:   0.694928
99.0%   KLD:   0.198300
90.0%   KLD:   0.065002
Median  KLD:   0.019921
RMS Δp    :  5.037 ± 0.215 %
Same top p: 90.353 ± 0.585 %
"""


@pytest.fixture(scope="module")
def tool():
    loader = SourceFileLoader("check_perplexity", str(FILE))
    module = module_from_spec(spec_from_loader("check_perplexity", loader))
    sys.modules["check_perplexity"] = module
    loader.exec_module(module)
    return module


def test_every_number_is_read(tool):
    found = tool.printed(OUTPUT)
    assert {name: (n.value, n.error) for name, n in found.items()} == {
        "mean KLD": (0.030333, 0.000842),
        "maximum": (0.694928, None),
        "99 %": (0.1983, None),
        "90 %": (0.065002, None),
        "median": (0.019921, None),
        "perplexity": (16.292228, 0.913488),
        "perplexity, source": (15.830417, 0.888667),
        "log ratio": (-0.028755, 0.00523),
        "RMS Δp, %": (5.037, 0.215),
        "same top, %": (90.353, 0.585),
    }
    with pytest.raises(SystemExit, match="did not print mean KLD"):
        tool.printed("no numbers")


@pytest.mark.parametrize(
    ("name", "change", "is_good"),
    [
        ("mean KLD", 0.0008, True),
        ("mean KLD", 0.0009, False),
        ("median", 0.0009, True),
        ("median", 0.0011, False),
        ("maximum", 0.3, True),
    ],
)
def test_what_is_a_difference(tool, capsys, name, change, is_good):
    wanted = tool.printed(OUTPUT)
    got = {what: number.value for what, number in wanted.items()}
    got[name] += change
    assert tool.compare("f", wanted, got) == is_good
    assert ("DIFFERS" in capsys.readouterr().out) != is_good


def test_the_tokens_of_a_base_file(tool, tmp_path):
    tokens = np.arange(8, dtype="<i4").reshape(2, 4)
    (tmp_path / "b").write_bytes(
        b"_logits_" + np.array([4, 99, 2], "<i4").tobytes() + tokens.tobytes() + b"rest"
    )
    with_bos = tokens.copy()
    with_bos[:, 0] = 50

    def report(found, bos):
        return {
            "text": {"bos": bos, "tokens_sha256": hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()}
        }

    assert tool.same_tokens(tmp_path / "b", report(tokens, None))
    assert tool.same_tokens(tmp_path / "b", report(with_bos, 50))
    assert not tool.same_tokens(tmp_path / "b", report(tokens, 50))
