"""Memory that a process may use: machine and container, both versions of control groups; devices by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import ConfigError
from trimtab.plan.machine import GIB, available_memory, cards, container_room, machine, multiplies_bfloat16

pytestmark = pytest.mark.unit


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


def test_version_2_takes_the_tightest_group_above(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/memory.max": "1000",
            "sys/fs/cgroup/a/memory.current": "700",
            "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 100",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "sys/fs/cgroup/a/b/memory.current": "300",
        },
    )
    assert container_room(root) == 1000 - 700 + 100


def test_version_1_and_the_root_of_a_container(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/docker/x\n4:memory:/docker/x",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1024",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 24",
        },
    )
    assert container_room(root) == 4096 - 1024 + 24


@pytest.mark.parametrize(
    "files", [{}, {"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63)}]
)
def test_no_limit(files: dict[str, str], tmp_path: Path) -> None:
    assert container_room(write(tmp_path, files)) is None
    assert available_memory(tmp_path) > 0


def test_the_limit_is_what_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "1000"},
    )
    assert available_memory(root) == 4000


def test_devices_by_name() -> None:
    assert machine("h100").memory == 80 * GIB
    assert machine("NVIDIA RTX 4090").name == "rtx-4090"
    assert machine("cuda:24GB").memory == 24 * GIB
    # times are those of the slowest card of the size; memory is as asked
    assert "rtx-3090" in machine("cuda:20GB").name and machine("cuda:20GB").memory == 20 * GIB
    assert machine("cpu:8GB", measure=False).memory == 8 * GIB
    with pytest.raises(ConfigError, match="did you mean 'rtx-4090'") as raised:
        machine("rtx-4091")
    assert all(name in raised.value.remedy for name in cards())


def test_bfloat16_of_a_cpu(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t: fpu avx512f avx512_bf16\n", encoding="utf-8")
    assert multiplies_bfloat16(info)
    info.write_text("flags\t: fpu avx2 avx512_bf16x\n", encoding="utf-8")
    assert not multiplies_bfloat16(info)
    assert not multiplies_bfloat16(tmp_path / "none")
