"""cluster.repair: what is decided, what is done about it, and the import hook in a real process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import repair
from cluster.repair import Action, Probe, RepairError, State, decide, last_error

NMS = "RuntimeError: operator torchvision::nms does not exist"
NOT_LOADED = "OSError: Could not load this library: /x/libtorchcodec.so"


@dataclass
class Environment:
    """Fake prober and mender: packages by state; the hook mends torchvision unless told not to."""

    reasons: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    hook_works: bool = True
    done: list[str] = field(default_factory=list)

    def __call__(self, package: str) -> Probe:
        if package in self.absent:
            return Probe(package, State.ABSENT, "not installed")
        if package in self.reasons:
            return Probe(package, State.BROKEN, self.reasons[package])
        return Probe(package, State.OK)

    def install_hook(self) -> None:
        self.done.append("hook")
        if self.hook_works:
            self.reasons.pop("torchvision", None)

    def uninstall(self, package: str) -> None:
        self.done.append(f"uninstall {package}")
        self.absent.add(package)


def mend(environment: Environment) -> list[str]:
    said: list[str] = []
    repair.repair(environment, environment, said.append)
    return said


@pytest.mark.parametrize(
    ("probe", "action"),
    [
        (Probe("torchvision", State.OK), Action.KEEP),
        (Probe("torchvision", State.BROKEN, NMS), Action.HOOK),
        (Probe("torchvision", State.BROKEN, "ImportError: no libjpeg"), Action.GIVE_UP),
        (Probe("torchvision", State.ABSENT), Action.GIVE_UP),
        (Probe("torchaudio", State.OK), Action.KEEP),
        (Probe("torchaudio", State.ABSENT), Action.KEEP),
        (Probe("torchaudio", State.BROKEN, NOT_LOADED), Action.UNINSTALL),
        (Probe("torchcodec", State.BROKEN, "python ended with code -11"), Action.GIVE_UP),
        (Probe("torchcodec", State.BROKEN, "no answer within 300 s"), Action.GIVE_UP),
    ],
)
def test_decision_for_each_state(probe: Probe, action: Action) -> None:
    assert decide(probe) is action


def test_intact_environment_is_not_touched() -> None:
    environment = Environment()
    assert mend(environment) == ["torchvision: ok", "torchaudio: ok", "torchcodec: ok"]
    assert environment.done == []


def test_broken_packages_are_mended_once() -> None:
    environment = Environment({"torchvision": NMS, "torchaudio": NOT_LOADED}, {"torchcodec"})
    first = mend(environment)
    assert [line.split()[1] for line in first] == ["mended", "removed", "absent"]
    assert environment.done == ["hook", "uninstall torchaudio"]
    assert mend(environment) == ["torchvision: ok", "torchaudio: absent", "torchcodec: absent"]
    assert environment.done == ["hook", "uninstall torchaudio"]


def test_still_broken_after_the_hook_is_an_error() -> None:
    with pytest.raises(RepairError, match="still cannot be imported with the import hook"):
        mend(Environment({"torchvision": NMS}, hook_works=False))


def test_unknown_failure_is_reported_with_its_words() -> None:
    environment = Environment({"torchvision": "ImportError: libjpeg.so.8"})
    with pytest.raises(RepairError, match=r"libjpeg\.so\.8"):
        mend(environment)
    assert environment.done == []


def test_nothing_is_changed_when_torch_itself_is_broken() -> None:
    environment = Environment({"torch": "ImportError: libc10.so", "torchaudio": NOT_LOADED})
    with pytest.raises(RepairError, match="torch cannot be imported"):
        mend(environment)
    assert environment.done == []


def test_last_error_is_the_exception_line() -> None:
    traceback = f"Traceback (most recent call last):\n  File 'x', line 1\n{NMS}\n"
    assert last_error(traceback, 1) == NMS
    assert last_error("Fatal Python error: Segmentation fault\n\n  <frames>", -11) == (
        "python ended with code -11"
    )


# -- the hook, in a process of its own with a stand-in torchvision and torch --------------------

FAKE_TORCH = """
class library:
    defined = []
    @classmethod
    def define(cls, name, schema):
        cls.defined.append(name)
"""
FAKE_TORCHVISION = """
from . import extension
import torch
if not extension._has_ops() and "torchvision::nms" not in torch.library.defined:
    raise RuntimeError("operator torchvision::nms does not exist")
"""


def write_packages(folder: Path, *, has_ops: bool) -> None:
    (folder / "torch.py").write_text(FAKE_TORCH)
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(FAKE_TORCHVISION)
    extension = f"import torch\ndef _has_ops():\n    return {has_ops}\n"
    (folder / "torchvision" / "extension.py").write_text(extension)
    (folder / f"{repair.HOOK_MODULE}.py").write_text(repair.HOOK_SOURCE.read_text())


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-S",
        "-E",
        "-c",
        f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_without_the_hook_the_stand_in_fails_as_the_real_one(tmp_path: Path) -> None:
    write_packages(tmp_path, has_ops=False)
    done = run_python(tmp_path, "import torchvision")
    assert repair.MISSING_OPERATOR in done.stderr


def test_hook_declares_both_operators_when_the_library_is_missing(tmp_path: Path) -> None:
    write_packages(tmp_path, has_ops=False)
    done = run_python(
        tmp_path, repair.PTH_LINE + "import torchvision, torch; print(*torch.library.defined)"
    )
    assert done.stdout.split() == ["torchvision::nms", "torchvision::qnms"], done.stderr


def test_hook_leaves_a_working_torchvision_alone(tmp_path: Path) -> None:
    write_packages(tmp_path, has_ops=True)
    done = run_python(
        tmp_path, repair.PTH_LINE + "import torchvision, torch; print(torch.library.defined)"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_hook_costs_no_torch_import_at_start_and_installs_once(tmp_path: Path) -> None:
    write_packages(tmp_path, has_ops=False)
    done = run_python(
        tmp_path,
        repair.PTH_LINE
        + repair.PTH_LINE
        + "names = [getattr(finder, '__name__', '') for finder in sys.meta_path]\n"
        + "print('torch' in sys.modules, 'typing' in sys.modules)\n"
        + "print(names.count('TorchvisionFinder'))",
    )
    assert done.stdout.split() == ["False", "False", "1"], done.stderr
