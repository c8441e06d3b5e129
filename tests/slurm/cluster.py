"""A SLURM of several nodes on this machine: each daemon listens on loopback, and keeps all it has in one folder."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from workers import free_port

PACKAGES = "slurm-wlm slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo", "scancel", "srun")
STARTING = 30  # seconds until all nodes are idle

CONFIGURATION = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldTimeout=30
SlurmdTimeout={daemon_timeout}
InactiveLimit=0
KillWait=20
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
"""


class Cluster:
    """`run` calls a command of SLURM's; `close` ends the daemons by their pids.

    A node counts as failed when its daemon has not answered for `daemon_timeout` seconds.
    """

    patience = 300  # seconds for a job to reach a state or a step; other tests may run beside it

    def __init__(self, folder, nodes=2, processors=2, daemon_timeout=60):
        self.folder, self.nodes = Path(folder), nodes
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        assert not missing, f"{missing} are not there: apt-get install -y --no-install-recommends {PACKAGES}"
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in ("munge", "state", *(f"spool.n{node}" for node in range(nodes))):
            (self.folder / name).mkdir(mode=0o755)
        self._configure(processors, daemon_timeout)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _configure(self, processors, daemon_timeout):
        values = {"port": free_port(), "user": getpass.getuser(), "folder": self.folder}
        values["daemon_timeout"] = daemon_timeout
        lines = [CONFIGURATION.format(**values)]
        for node in range(self.nodes):
            place = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(f"NodeName=n{node} {place} CPUs={processors} RealMemory=1000 State=UNKNOWN\n")
        lines.append(f"PartitionName=all Nodes=n[0-{self.nodes - 1}] Default=YES MaxTime=INFINITE State=UP\n")
        (self.folder / "slurm.conf").write_text("".join(lines))
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)

    def _start(self):
        munge = self.folder / "munge"
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", *(f"--{option}={munge / name}" for option, name in places.items()))
        self.run("slurmctld", "-c", "-f", str(self.folder / "slurm.conf"))
        for node in range(self.nodes):
            self.start_daemon(node)
        self.await_(lambda: f"idle {self.nodes}" in self.run("sinfo", "-h", "-o", "%T %D"), STARTING, "no idle nodes")

    def start_daemon(self, node):
        self.run("slurmd", "-N", f"n{node}", "-f", str(self.folder / "slurm.conf"))

    def kill_daemon(self, node):
        """End the daemon of a node with SIGKILL; the processes of its jobs go on."""
        os.kill(int((self.folder / f"slurmd.n{node}.pid").read_text()), signal.SIGKILL)

    def run(self, *command, **environment):
        values = {**self.environment, **environment}
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=values, cwd=self.folder)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def await_(self, condition, patience, complaint):
        end = time.monotonic() + patience
        while not (value := condition()):
            logs = "".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log")))
            assert time.monotonic() < end, f"{complaint} in {patience} s\n{logs}"
            time.sleep(0.3)
        return value

    # Jobs

    def submit(self, *arguments, **environment):
        return self.run("sbatch", "--parsable", *arguments, **environment).strip()

    def about(self, job):
        """Return the job's record in SLURM: {"JobState": "RUNNING", ...}"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def await_state(self, job, *states):
        """Return the record of a job once it is in one of these states."""
        seen = {}

        def reached():
            seen.update(self.about(job))
            return seen["JobState"] in states

        try:
            self.await_(reached, self.patience, f"job {job} was none of {states}")
        except AssertionError as error:
            error.add_note(str(seen))
            raise
        return seen

    def close(self):
        pids = []
        for path in (*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munge/pid"):
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                pids.append(int(path.read_text()))
                os.kill(pids[-1], signal.SIGTERM)
        end = time.monotonic() + 15
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
