"""Libraries that import, that raise, that end the process, that hang."""

import pytest

from d2qconv.doctor.probe import examine

MODULES = {
    "fine_lib": "__version__ = '1.2'\nprint('noise')\ndef facts():\n    return {'devices': 'CPU'}\n",
    "absent_part": "import no_such_module_at_all\n",
    "no_object": "raise OSError('libx.so.3: cannot open shared object file')\n",
    "crashing": "import os\nos.abort()\n",
    "leaving": "import os\nos._exit(3)\n",
    "after": "__version__ = '7'\n",
}


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("libraries")
def test_a_broken_library_is_told_and_hides_no_other():
    found = examine(list(MODULES), {"fine_lib": "fine_lib:facts"})
    assert found["fine_lib"].version == "1.2"
    assert found["fine_lib"].facts == {"devices": "CPU"}
    assert "No module named 'no_such_module_at_all'" in found["absent_part"].error
    assert found["no_object"].error.startswith("OSError: libx.so.3")
    assert found["crashing"].error == "importing it ends the process by signal 6"
    assert found["leaving"].error == "importing it ends the process with code 3"
    assert found["after"].version == "7"


@pytest.mark.usefixtures("libraries")
def test_details_that_fail_are_told():
    assert "has no attribute 'gone'" in examine(["after"], {"after": "after:gone"})["after"].error


def test_a_library_that_hangs(tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert examine(["hanging"], seconds=1)["hanging"].error == "importing it took more than 1 s"


def test_the_folder_it_is_started_in_counts_for_nothing(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')\n")
    (tmp_path / "lurking.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "No module named" in examine(["lurking"])["lurking"].error
