"""What a preflight makes of machines: GPUs, memory, versions and clocks, from facts alone.

Not covered: nvidia-smi and torch on a real GPU.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cluster.preflight.clocks import Offset, judge_clocks, measure_clocks, offset
from cluster.preflight.crew import Node, Unanswered
from cluster.preflight.findings import Check, Fault
from cluster.preflight.gpus import Gpu, GpuFacts, Torch, judge_gpus, parse_gpus
from cluster.preflight.memory import (
    MemoryFacts,
    judge_memory,
    judge_shared_memory,
    look_at_memory,
    shared_need_gib,
)
from cluster.preflight.versions import ABSENT, installed, judge_versions
from pipeline.profile import load_profile
from tests.preflight_cases import HereCrew, cpu_node, gpu_node

H100 = load_profile("maverick-fp8-8xh100")
MINI = load_profile("mini-maverick")
GPU = Gpu("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 0, "580.82", 0)
SOUND = GpuFacts((GPU,) * 8, Torch("13.0", "2.28.3", 8))
NODE = gpu_node("a")
SMI = """\
NVIDIA H100 80GB HBM3, 81559, 4, 580.82.07, 0
NVIDIA H100 80GB HBM3, 81559, 70123, 580.82.07, 2
NVIDIA A10G, 23028, 0, 580.82.07, [N/A]
"""


def gpu_faults(facts: GpuFacts, node: Node = NODE) -> list[Fault]:
    return judge_gpus(H100, {node: facts}, [node])


def test_nvidia_smi_is_read_with_and_without_ecc() -> None:
    gpus = parse_gpus(SMI)
    assert [gpu.ecc_errors for gpu in gpus] == [0, 2, 0]
    assert [gpu.used_bytes // 2**20 for gpu in gpus] == [4, 70123, 0]
    assert gpus[0].kind == "NVIDIA H100 80GB HBM3"
    assert gpus[0].memory_bytes == 81_559 * 2**20
    assert gpus[0].driver == "580.82.07"


def test_sound_gpus_have_no_fault() -> None:
    assert gpu_faults(SOUND) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (GpuFacts(problem="nvidia-smi is not installed"), "mend the driver"),
        (replace(SOUND, gpus=(GPU,) * 7), "Ray counts 8 GPUs and the driver shows 7"),
        (replace(SOUND, torch=Torch("13.0", "2", 0, "driver too old")), "CUDA 13.0.*too old"),
        (replace(SOUND, torch=Torch("13.0", "2", 6)), "finds 6 of 8"),
        (replace(SOUND, gpus=(*(GPU,) * 7, replace(GPU, kind="A100"))), "several kinds"),
        (replace(SOUND, gpus=(replace(GPU, memory_bytes=40 * 10**9),) * 8), "40 GB.*84.9 GB"),
        (replace(SOUND, gpus=(*(GPU,) * 7, replace(GPU, ecc_errors=3))), "GPU 7 has 3 uncorrected"),
        (
            replace(SOUND, gpus=(replace(GPU, used_bytes=20 * 2**30), *(GPU,) * 7)),
            "GPU 0 has 60",
        ),
    ],
)
def test_each_gpu_fault_is_a_sentence(facts: GpuFacts, words: str) -> None:
    (fault,) = gpu_faults(facts)
    assert fault.check is Check.GPUS
    assert fault.nodes == ("a",)
    assert re.search(words, fault.message), fault.message


def test_memory_that_a_job_holds_is_no_fault() -> None:
    full = replace(SOUND, gpus=(replace(GPU, used_bytes=75 * 2**30),) * 8)
    assert gpu_faults(full, gpu_node("a", held_gpus=8)) == []


def test_gpus_that_ray_does_not_count_are_told() -> None:
    node = gpu_node("a", gpus=0)
    (fault,) = judge_gpus(H100, {node: SOUND}, [])
    assert "the driver shows 8 GPUs and Ray counts 0" in fault.message


def test_a_node_without_gpus_beside_those_that_have_some_is_no_gpu_fault() -> None:
    head = cpu_node("head")
    assert judge_gpus(H100, {NODE: SOUND, head: GpuFacts()}, [NODE]) == []


def test_a_profile_without_gpus_asks_for_none() -> None:
    assert judge_gpus(MINI, {NODE: GpuFacts(problem="none")}, [NODE]) == []


def test_too_little_memory_is_a_fault_unless_somebody_works_there() -> None:
    facts = MemoryFacts(total_gib=16, available_gib=2, shared_gib=8)
    (fault,) = judge_memory(MINI, {cpu_node("a"): facts, cpu_node("b", held_cpus=2): facts})
    assert fault.nodes == ("a",)
    assert "2.0 GiB of memory are available, and a replica takes 5 GiB" in fault.message


def test_dockers_own_64_mib_of_shared_memory_are_a_fault() -> None:
    small = MemoryFacts(16, 12, shared_gib=64 / 1024)
    enough = MemoryFacts(16, 12, shared_gib=8)
    (fault,) = judge_shared_memory(MINI, {cpu_node("a"): small, cpu_node("b"): enough})
    assert fault.nodes == ("a",)
    assert "/dev/shm has 0.06 of 0.93 GiB" in fault.message
    assert "--shm-size" in fault.message


def test_shared_memory_grows_with_the_workers_and_with_rays_store() -> None:
    # 160 MiB to the workers, 240 MiB back from each of 8, 1 GiB for NCCL, 200 for Ray
    assert shared_need_gib(H100, NODE) == pytest.approx(200 + 0.15625 + 8 * 0.234375 + 1)


def test_this_machines_memory_is_seen() -> None:
    facts = look_at_memory()
    assert 0 < facts.available_gib <= facts.total_gib


def test_equal_versions_are_no_fault() -> None:
    assert judge_versions({"driver": installed(), "a": installed()}) == []


def test_the_node_with_another_version_is_named() -> None:
    sound = installed()
    (fault,) = judge_versions({"driver": sound, "a": sound, "b": {**sound, "torch": "2.11.0"}})
    assert fault.nodes == ("b",)
    assert f"torch is not the same everywhere: {sound['torch']} on driver, a; 2.11.0 on b" in (
        fault.message
    )


def test_a_package_that_no_node_has_is_a_fault() -> None:
    versions = {**installed(), "torch": ABSENT}
    (fault,) = judge_versions({"driver": versions, "a": versions})
    assert fault.nodes == ("driver", "a")
    assert "torch is not installed" in fault.message


def test_drivers_are_compared_between_the_nodes_that_have_one() -> None:
    gpus = {**installed(), "nvidia driver": "580"}
    (fault,) = judge_versions(
        {"driver": installed(), "a": gpus, "b": {**gpus, "nvidia driver": "570"}}
    )
    assert "nvidia driver is not the same everywhere: 580 on a; 570 on b" in fault.message


def test_an_offset_is_taken_from_the_middle_of_the_round_trip() -> None:
    found = offset(100.0, 105.0, 102.0)
    assert (found.seconds, found.uncertainty_s) == (4.0, 1.0)
    assert found.at_least_s == 3.0


def test_a_skewed_clock_is_a_fault_and_a_slow_answer_is_not() -> None:
    clocks = {
        "a": Offset(0.2, 0.01),
        "b": Offset(-90.0, 0.01),
        "c": Offset(1.4, 0.6),  # may be 0.8 s off
    }
    (fault,) = judge_clocks(clocks, {})
    assert fault.nodes == ("b",)
    assert "90.0 s behind the driver's" in fault.message


def test_a_stores_clock_may_be_a_minute_off() -> None:
    (fault,) = judge_clocks({}, {"a": Offset(300.0, 1.0), "b": Offset(50.0, 1.0)})
    assert fault.nodes == ("a",)
    assert "the object store's clock is 300.0 s ahead of the node's" in fault.message


def test_clocks_of_this_machine_agree() -> None:
    crew = HereCrew([cpu_node("a"), cpu_node("b")], {("b", "time"): Unanswered("it is gone")})
    found = measure_clocks(crew, ["id-a", "id-b"])
    assert isinstance(found["id-a"], Offset)
    assert found["id-a"].at_least_s == 0
    assert found["id-b"] == Unanswered("it is gone")
