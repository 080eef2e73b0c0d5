"""Looking an architecture up, ours and a plug-in's."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from d2qconv.arch import registry
from d2qconv.arch.registry import BUILT_IN, architecture_of, supported
from d2qconv.errors import InputError, PlanError, PluginError
from d2qconv.names import Role


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    """Pretend that these entry points are installed."""
    found = EntryPoints(EntryPoint(name, value, registry.GROUP) for name, value in points)

    def entry_points(**wanted: str) -> EntryPoints:
        return found.select(**wanted)

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_ours() -> None:
    assert set(BUILT_IN) == {"llama", "mistral", "qwen2", "qwen3"} <= set(supported())
    for name, arch in BUILT_IN.items():
        assert architecture_of({"model_type": name}) is arch


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_tables(name: str) -> None:
    arch = BUILT_IN[name]
    keys = [key.name for key in arch.config_keys]
    assert len(keys) == len(set(keys))
    assert set(arch.config_defaults) <= set(keys)
    assert len({s.role for s in arch.sites}) == len(arch.sites)
    scale, shift = arch.coupling("scale", Role.DOWN), arch.coupling("shift", Role.FFN_NORM)
    assert scale is not None
    assert scale.absorbs == (Role.UP,)
    assert shift is not None
    assert shift.absorbs == (Role.GATE, Role.UP)
    assert all(c.why for c in arch.couplings)
    assert arch.has_qk_norm == (name == "qwen3")
    biased = {s.role for s in arch.sites if s.can_have_bias}
    attention = {Role.Q, Role.K, Role.V, Role.O}
    expected = {
        "llama": attention | {Role.GATE, Role.UP, Role.DOWN},
        "mistral": set(),
        "qwen2": attention - {Role.O},
        "qwen3": attention,
    }
    assert biased == expected[name]


def test_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("mine", "x:Y"))
    with pytest.raises(
        PlanError, match="'gpt2' is not supported; supported are llama, mine, mistral, qwen2, qwen3"
    ):
        architecture_of({"model_type": "gpt2"})
    for config in ({}, {"model_type": None}, {"model_type": ["llama"]}):
        with pytest.raises(InputError, match="model_type must be a string"):
            architecture_of(config)


def test_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "d2qconv.arch.llama:ARCHITECTURE"
    install(monkeypatch, ("llama", "nowhere:X"))
    assert architecture_of({"model_type": "llama"}) is BUILT_IN["llama"]
    for value, why in (
        ("nowhere_at_all:X", "does not load"),
        ("d2qconv.arch.llama:ABSENT", "does not load"),
        ("d2qconv.arch.llama:Role", "expected an Architecture"),
        (ours, "its table is for model_type 'llama'"),
    ):
        install(monkeypatch, ("mine", value))
        with pytest.raises(PluginError, match=why):
            architecture_of({"model_type": "mine"})
    install(monkeypatch, ("mine", ours), ("mine", "other:X"))
    with pytest.raises(PluginError, match="several plug-ins"):
        architecture_of({"model_type": "mine"})


def test_a_plug_in_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "d2qconv_test_plugin_arch.py").write_text(
        "from dataclasses import replace\n"
        "from d2qconv.arch.llama import ARCHITECTURE\n"
        "ARCHITECTURE = replace(ARCHITECTURE, id='mine', model_type='mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, ("mine", "d2qconv_test_plugin_arch:ARCHITECTURE"))
    assert architecture_of({"model_type": "mine"}).id == "mine"
    assert "mine" in supported()
