"""hydra/launcher=slurm: the runs of a sweep as one Slurm array; the command waits for them.

    python -m needle.train --multirun hydra/launcher=slurm loss=hard_label,forward_kl seed=1,2,3

On top of hydra-submitit-launcher's, which submits: a run that Slurm ends without a result (no memory left, cancelled, a
node lost) is told as failed, also where Slurm keeps no accounts; one failed run does not keep the results of the
others; Ctrl-C here cancels the jobs; and the warning before the end of a job's time, like scancel, lets the training
write a checkpoint. Costs one `squeue` every POLL_S seconds.
"""

import dataclasses
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

from hydra_plugins.needle_launchers._jobs import LaunchError, failed, stopping, tell_failures

log = logging.getLogger(__name__)

POLL_S = 5
# After Slurm has let go of a job, its last file may still be on its way through a network file system.
RESULT_DELAY_S = 20
LOG_LINES = 12


class SlurmLauncher(BaseSubmititLauncher):
    """Settings: conf/hydra/launcher/slurm.yaml."""

    _EXECUTOR = "slurm"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits, waits, and returns every run's result in order.

        Raises:
            LaunchError: there is no Slurm here, or it refuses the jobs.
            KeyboardInterrupt: the wait was stopped, and the jobs with it.
        """
        if shutil.which("sbatch") is None:
            raise LaunchError(
                "hydra/launcher=slurm: there is no sbatch on this machine; run it where jobs are submitted, choose "
                "hydra/launcher=joblib, or start a Slurm of one node with tests/servers/slurm_node.sh"
            )
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = self._submit(job_overrides, initial_job_idx)
        numbers = [job.job_id for job in jobs]
        log.info(f"Slurm jobs {numbers[0]} to {numbers[-1]}, output: {self.params['submitit_folder']}")
        for job, overrides in zip(jobs, job_overrides, strict=True):
            log.info(f"\t{job.job_id} : {' '.join(filter_overrides(overrides))}")
        with stopping(lambda: _cancel(numbers)):
            _wait(jobs)
        results = [_result(job, overrides) for job, overrides in zip(jobs, job_overrides, strict=True)]
        tell_failures(results)
        return results

    def __call__(self, sweep_overrides: list[str], *args: Any, **kwargs: Any) -> JobReturn:
        """One run, inside its job. An exit becomes a result: submitit would not write one."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which the shell of a batch job may ignore
        # scancel, and the warning that time is up: like Ctrl-C. submitit would pass over the one, and at the other drop
        # the training where it is.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            return super().__call__(sweep_overrides, *args, **kwargs)
        except (SystemExit, KeyboardInterrupt) as end:
            return failed(sweep_overrides, end)

    def _submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        import submitit

        common = {field.name for field in dataclasses.fields(BaseQueueConf)}
        special = {"submitit_folder", "max_num_timeout"}
        executor = submitit.AutoExecutor(
            folder=self.params["submitit_folder"],
            cluster=self._EXECUTOR,
            slurm_max_num_timeout=self.params["max_num_timeout"],
        )
        options = {k if k in common else f"slurm_{k}": v for k, v in self.params.items() if k not in special}
        executor.update_parameters(**options)
        state = Singleton.get_state()
        columns = zip(
            *(
                (list(overrides), "hydra.sweep.dir", initial_job_idx + index, "", state)
                for index, overrides in enumerate(job_overrides)
            ),
            strict=True,
        )
        try:
            return executor.map_array(self, *columns)
        except submitit.core.utils.FailedJobError as error:
            raise LaunchError(f"hydra/launcher=slurm: sbatch refused the jobs: {error}") from None


def _wait(jobs: Sequence[Any]) -> None:
    """Until every job has left a result, or Slurm does not know it any more and none came within RESULT_DELAY_S."""
    gone_since: dict[str, float] = {}
    while True:
        waiting = [job for job in jobs if not job.paths.result_pickle.exists()]
        known = _known_to_slurm() if waiting else set()
        now = time.monotonic()
        for job in waiting:
            # A busy controller that does not answer has let go of nothing.
            if known is None or job.job_id in known:
                gone_since.pop(job.job_id, None)
            else:
                gone_since.setdefault(job.job_id, now)
        if all(now - gone_since.get(job.job_id, now) >= RESULT_DELAY_S for job in waiting):
            return
        time.sleep(POLL_S)


def _known_to_slurm() -> set[str] | None:
    """Identities of this user's jobs that wait or run, arrays one by one; None when Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i %F_%K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.split()) if done.returncode == 0 else None


def _result(job: Any, overrides: Sequence[str]) -> JobReturn:
    if not job.paths.result_pickle.exists():
        return failed(overrides, LaunchError(_obituary(job)))
    outcome, result = job._get_outcome_and_result()
    return result if outcome == "success" else failed(overrides, LaunchError(f"Slurm job {job.job_id}: {result}"))


def _obituary(job: Any) -> str:
    """What Slurm and the job's own log say about a job that left no result."""
    done = subprocess.run(["scontrol", "show", "job", job.job_id], capture_output=True, text=True, check=False)
    state = re.search(r"JobState=(\S+)", done.stdout)
    told = state[1] if state else "Slurm has forgotten it"
    lines = [f"Slurm job {job.job_id} left no result: {told}; the end of {job.paths.stderr}:"]
    if job.paths.stderr.exists():
        lines += job.paths.stderr.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return os.linesep.join(lines)


def _cancel(numbers: Sequence[str]) -> None:
    subprocess.run(["scancel", *{number.split("_")[0] for number in numbers}], check=False)
