"""What a node has, and how a person writes it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire.elastic.inventory import CHIPS, Chip, Device, Inventory, cpu_model, parse_gpus
from latentwire.errors import ConfigError

H200 = Device("NVIDIA H200", 150 * 10**9)


def test_an_inventory_says_what_may_change_bits() -> None:
    now = Inventory((H200, H200), "EPYC", {"torch": "2.13.0"})
    as_now = json.loads(json.dumps(dataclasses.asdict(Inventory((H200,), "EPYC", {"torch": "2.13.0"}))))
    assert now.changes_since(as_now) == []
    assert now.changes_since({**as_now, "gpus": ["NVIDIA H200"]}) == [], "as attempts wrote it before"
    changes = now.changes_since({"gpus": ["A100"], "cpu_model": "Xeon", "versions": {"torch": "2.12.0"}})
    assert [change.partition(":")[0] for change in changes] == ["gpus", "cpu_model", "versions"]
    assert changes[0] == "gpus: ['A100'] -> ['NVIDIA H200']"
    assert len(now.changes_since({})) == 3


def test_an_inventory_comes_back_from_environment_json() -> None:
    inventory = Inventory((H200, Device("NVIDIA A100 MIG 3g.20gb", 20, is_mig=True)), "EPYC", {"torch": "2.13.0"})
    record = json.loads(json.dumps(dataclasses.asdict(inventory) | {"host": "n1"}))
    assert Inventory.from_json(record) == inventory


def test_the_processor_of_this_machine_has_a_name() -> None:
    assert cpu_model(["processor : 0\n", "model name\t: Some CPU @ 2 GHz\n"]) == "Some CPU @ 2 GHz"
    assert cpu_model([]) == "unknown"
    assert cpu_model(Path("/proc/cpuinfo").read_text().splitlines())


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("Tesla V100-SXM2-32GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("h100-pcie", "H100 PCIE"),
    ],
)
def test_a_chip_is_known_by_the_name_that_the_driver_gives_it(name: str, chip: str) -> None:
    assert Device(name, 1).chip is CHIPS[chip]
    assert Device(name, 1).flops_per_s == CHIPS[chip].tflops * 1e12


def test_of_an_unknown_chip_nothing_is_said() -> None:
    assert Device("NVIDIA X9000", 1).chip is None
    assert Device("NVIDIA X9000", 1).flops_per_s is None


def test_a_slice_has_its_sevenths_of_the_chip() -> None:
    assert Device("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 1, is_mig=True).flops_per_s == pytest.approx(3 / 7 * 312e12)
    assert Device("H200-MIG", 1, is_mig=True).flops_per_s is None
    assert Device("H200-MIG", 1, is_mig=True).chip == Chip(989)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0", ()),
        ("H200-141GB", (Device("H200", 141 * 10**9),)),
        ("2xH100-80GB", (Device("H100", 80 * 10**9),) * 2),
        ("1xa100-40gb + H100-PCIe-80GB", (Device("a100", 40 * 10**9), Device("H100-PCIe", 80 * 10**9))),
        ("1xH200-MIG-71GB", (Device("H200-MIG", 71 * 10**9, is_mig=True),)),
        ("10xL4-22.5GB", (Device("L4", 22_500_000_000),) * 10),
    ],
)
def test_gpus_as_a_person_writes_them(text: str, devices: tuple[Device, ...]) -> None:
    assert parse_gpus(text) == devices


@pytest.mark.parametrize("text", ["", "4", "4xH100", "H100-80", "0xH100-80GB", "4 H100-80GB", "H100-80GB+", "H100-0GB"])
def test_another_form_is_refused_by_naming_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form 4xH100-80GB"):
        parse_gpus(text)


@given(st.text(max_size=30))
def test_any_text_is_devices_or_an_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert all(device.memory_bytes > 0 for device in parse_gpus(text))
