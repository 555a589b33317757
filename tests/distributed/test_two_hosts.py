"""Two hosts whose own names resolve to the loopback, as Debian sets them up: network namespaces, so it needs root."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launchers import ROOT, SHORT, assert_close_runs, deepspeed_launcher, free_port, outside_ranks, run

from vtfast.distributed import interface

FLAGS = ["--per_device_train_batch_size", "4", "--eval_data", "none"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two network namespaces with addresses 10.77.0.1 and 10.77.0.2 and a hosts file of their own."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare")
    names = [f"vtfast{os.getpid()}-{number}" for number in (0, 1)]
    folders = [Path("/etc/netns") / name for name in names]
    try:
        for name, folder in zip(names, folders, strict=True):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"veth{number}")
            ip("-n", name, "link", "set", f"veth{number}", "up")
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def start(host: str, rank: int, port: int, folder: Path, *flags: str, **environment: str) -> subprocess.Popen:
    on_host = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return subprocess.Popen(
        [*on_host, sys.executable, str(ROOT / "train.py"), *SHORT, *FLAGS, "--output_dir", str(folder), *flags],
        env=outside_ranks()
        | {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "10.77.0.1"}
        | {name: str(value) for name, value in ranks.items()}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path, hosts):
    run(tmp_path / "one", *FLAGS, launcher=deepspeed_launcher())
    port = free_port()
    both = [start(host, rank, port, tmp_path / "two", "--ddp_timeout", "60") for rank, host in enumerate(hosts)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)[-3000:]
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_the_interface_is_that_of_the_way_to_the_master(monkeypatch):
    names = psutil.net_if_addrs()
    assert interface.find_interface("127.0.0.1", 1234) in {None, *names.keys() - {"lo"}}, "never the loopback"
    monkeypatch.setattr(interface, "_own_address", lambda host, port: {"near": "10.0.0.7", "me": "127.0.1.1"}.get(host))
    addresses = {"lo": [Address("127.0.1.1")], "eth0": [Address("fe80::1%eth0"), Address("10.0.0.7")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    assert interface.find_interface("near", 1) == "eth0"
    assert interface.find_interface("me", 1) is None


class Address:
    def __init__(self, address: str) -> None:
        self.address = address


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "eth7"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({}, None),
    ],
)
def test_only_several_machines_need_one_and_the_user_may_name_it(monkeypatch, environment, expected):
    mine = environment | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    monkeypatch.setattr(interface.os, "environ", mine)
    monkeypatch.setattr(interface, "find_interface", lambda *_: "eth7")
    interface.set_gloo_interface()
    assert mine.get("GLOO_SOCKET_IFNAME") == expected
