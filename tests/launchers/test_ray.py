"""hydra/launcher=ray on a real Ray of this machine, where one is installed; its absence is told everywhere."""

import importlib.util
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: needle[ray]")


@needs_ray
def test_every_end_of_a_run_is_told_and_none_keeps_the_others(application):
    started = application.start("ray", "well,error,exit,killed")
    _, err = started.communicate(timeout=240)
    assert started.returncode == 1, err
    assert application.files() == {"well.started", "well.done", "error.started", "exit.started", "killed.started"}
    assert application.told("well.started")["cwd"] == str(application.folder)
    assert "3 of 4 runs did not end well" in err
    for word in ("ValueError: seventeen", "exit status 2", "Ray lost the run"):
        assert word in err, word


@needs_ray
def test_ray_listens_on_loopback_and_ctrl_c_lets_a_run_finish_its_step(application):
    started = application.start("ray", "long,well", "hydra.launcher.runs_at_a_time=1")
    until = time.monotonic() + 120
    while "long.started" not in application.files():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    assert set(ray_listens_on()) == {"127.0.0.1"}
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=120)
    assert application.files() == {"long.started", "long.stopped"}
    assert "stopping the runs" in err


def ray_listens_on() -> list[str]:
    """Local addresses at which a process of Ray listens, as Linux tells them."""
    addresses = {}
    for family, name in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            words = bytes.fromhex(local.split(":")[0])
            packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
            if state == "0A":
                addresses[f"socket:[{rest[5]}]"] = socket.inet_ntop(family, packed).removeprefix("::ffff:")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(word in (folder / "cmdline").read_bytes() for word in (b"ray::", b"raylet", b"gcs_server")):
                links = [os.readlink(descriptor) for descriptor in (folder / "fd").iterdir()]
                found += [addresses[link] for link in links if link in addresses]
    return found


@needs_ray
def test_more_than_the_machine_has_is_refused(application):
    started = application.start("ray", "well", "hydra.launcher.gpus_per_run=1000")
    _, err = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "hydra.launcher.gpus_per_run=1000" in err
    assert "Traceback" not in err


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_way_out_is_told(application):
    started = application.start("ray", "well")
    _, err = started.communicate(timeout=60)
    assert started.returncode == 1
    assert "uv pip install" in err
    assert "Traceback" not in err
