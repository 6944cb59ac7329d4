"""hydra/launcher=ray: the runs of a sweep as Ray tasks, on this machine or on a cluster that is up; the command waits.

    python -m needle.train --multirun hydra/launcher=ray loss=hard_label,forward_kl seed=1,2,3

Needs the extra `ray`, two packages of 200 MB: `.venv/bin/uv pip install -e .[ray]`. Every node sees the repository and
its folders under the same path, as with Slurm. A Ray of this command's own takes ten to twenty seconds to start, and
listens on 127.0.0.1 alone.

hydra-ray-launcher is not used: it pins cloudpickle and dateutil to releases older than other packages here ask for,
brings the clients of one cloud, opens a dashboard, and a run that exits or is lost ends its whole launch.
"""

import importlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from hydra_plugins.needle_launchers._jobs import LaunchError, failed, stopping, tell_failures

log = logging.getLogger(__name__)

# Time for stopped runs to finish their step and write a checkpoint.
STOP_S = 30
# Time for what the workers printed last to arrive.
OUTPUT_S = 1


class RayLauncher(Launcher):
    """Settings: conf/hydra/launcher/ray.yaml."""

    def __init__(self, *, address: str | None, cpus_per_run: int, gpus_per_run: float, runs_at_a_time: int | None):
        self.address, self.runs_at_a_time = address, runs_at_a_time
        self.cpus_per_run, self.gpus_per_run = cpus_per_run, gpus_per_run

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Starts or joins Ray, waits, and returns every run's result in order.

        Raises:
            LaunchError: Ray is not installed, or the cluster does not answer or lacks what a run asks for.
            KeyboardInterrupt: the wait was stopped, and the runs with it.
        """
        ray = _ray(own=self.address is None)
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        self._join(ray)
        try:
            remote = ray.remote(num_cpus=self.cpus_per_run, num_gpus=self.gpus_per_run, max_retries=0)(_run)
            shared = ray.put((self.hydra_context, self.config, self.task_function, Singleton.get_state(), os.getcwd()))
            waiting = [
                (index, list(overrides), initial_job_idx + index) for index, overrides in enumerate(job_overrides)
            ]
            return self._gather(ray, remote, shared, waiting)
        finally:
            time.sleep(OUTPUT_S)
            ray.shutdown()

    def _join(self, ray: Any) -> None:
        options: dict[str, Any] = {"logging_level": logging.WARNING, "address": self.address}
        if self.address is None:
            options |= {"address": "local", "include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LaunchError(f"hydra.launcher.address={self.address}: no Ray to run on: {error}") from None
        has = ray.cluster_resources()
        for key, wanted, setting in (
            ("CPU", self.cpus_per_run, "cpus_per_run"),
            ("GPU", self.gpus_per_run, "gpus_per_run"),
        ):
            # Ray would wait for such a node to join.
            if wanted > has.get(key, 0):
                ray.shutdown()
                raise LaunchError(
                    f"hydra.launcher.{setting}={wanted}: this Ray has {has.get(key, 0):g} {key}s; ask less"
                )

    def _gather(self, ray: Any, remote: Any, shared: Any, waiting: list[tuple[int, list[str], int]]) -> list[JobReturn]:
        """Every run's result; `waiting` holds place, overrides and number of each."""
        results: list[Any] = [None] * len(waiting)
        limit = self.runs_at_a_time or len(waiting)
        running: dict[Any, tuple[int, list[str]]] = {}

        def cancel() -> None:
            for task in running:
                ray.cancel(task)
            ray.wait(list(running), num_returns=len(running), timeout=STOP_S)

        with stopping(cancel):
            while waiting or running:
                while waiting and len(running) < limit:
                    place, overrides, number = waiting.pop(0)
                    log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
                    running[remote.remote(shared, overrides, number)] = (place, overrides)
                for task in ray.wait(list(running), num_returns=1)[0]:
                    place, overrides = running.pop(task)
                    results[place] = _result(ray, task, overrides)
        tell_failures(results)
        return results


def _run(shared: tuple, overrides: list[str], number: int) -> JobReturn:
    """One run, in a Ray worker."""
    hydra_context, config, task_function, state, folder = shared
    os.chdir(folder)
    setup_globals()
    Singleton.set_state(state)
    own = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(own):
        own.hydra.job.id = f"{own.hydra.job.name}_{number}"
        own.hydra.job.num = number
    HydraConfig.instance().set_config(own)
    try:
        return run_job(
            hydra_context=hydra_context,
            config=own,
            task_function=task_function,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except (SystemExit, KeyboardInterrupt) as end:  # of this run; the worker goes on to the next
        return failed(overrides, end)


def _result(ray: Any, task: Any, overrides: list[str]) -> JobReturn:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:  # the worker was killed, its memory or its node is gone
        return failed(overrides, LaunchError(f"Ray lost the run: {error}"))


def _ray(*, own: bool) -> Any:
    """The package. It reads its environment when it is first imported; `own`: for a Ray of this command's own."""
    if own:
        # On one machine, listen on 127.0.0.1: what Ray does by itself on macOS and Windows, hence the name.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports nothing to its makers
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise LaunchError(
            'hydra/launcher=ray: Ray is not installed; run `.venv/bin/uv pip install "ray~=2.60"`, or choose '
            "hydra/launcher=joblib"
        ) from None
