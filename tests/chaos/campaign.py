"""A run under fire: kill after kill, start after start, until it is complete.

In: a mini-cluster, a job's command line, and victims in order. Out: a ``Story``: what was killed
when, how the driver's starts ended, which replicas' processes died when, and what troubled.

A kill lands a random time after progress was seen again: a generation finished by an engine that
did not exist before the last kill (after an outage of the S3 server: any). When the driver ends
before the run is complete, the same command is started again. A ``Watcher`` thread reads ledger
and processes meanwhile, so that times are right while a node is being started.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil

from cluster.lifecycle import LocalCluster
from tests.chaos import victims
from tests.chaos.judge import Owner
from tests.chaos.ledger import Generation, LedgerReader, now
from tests.chaos.victims import TERMINATED, Found, Victim

log = logging.getLogger(__name__)

_TICK_S = 0.2
_SAME_START_S = 0.05  # start times count in clock ticks of 10 ms
_MAX_IDLE_STARTS = 10
"""Starts in a row without a finished generation, after which the run is given up."""
_COMPLETE = (0, 3)
"""Exit codes of a run that is whole: within its error rate, or above it."""
_LEFT_OVER_S = 30.0
"""What engines get to notice that their replica is gone."""


@dataclass(frozen=True)
class Fire:
    """How hard."""

    pause_s: tuple[float, float] = (1.5, 8.0)
    """From progress to the next kill."""
    outage_s: float = 10.0
    """How long the S3 server is away."""
    node_away_s: float = 5.0
    """From a raylet's death to the node's replacement."""
    stuck_s: float = 300.0
    """Without progress for so long, the run is given up."""
    restart_s: float = 2.0
    """From the driver's end to its next start, as a scheduler would wait."""


@dataclass(frozen=True)
class Job:
    """The command line of a run, to be started as often as it takes."""

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    """For its output: ``start-<n>.out`` and ``.log``."""
    ledger: Path


@dataclass(frozen=True)
class Strike:
    """One kill."""

    victim: Victim
    at: float
    until: float
    """When an outage ended; else ``at``."""
    pid: int
    where: str


@dataclass(frozen=True)
class Story:
    """What happened."""

    started: float
    ended: float
    strikes: Sequence[Strike]
    exits: Sequence[int]
    errors: Sequence[str]
    """Of starts that ended with an error, as their results told them."""
    result: Mapping[str, Any] | None
    """The last start's JSON line."""
    generations: Sequence[Generation]
    deaths: Mapping[Owner, float]
    left_over: Sequence[str]
    troubles: Sequence[str]

    @property
    def outages(self) -> list[tuple[float, float]]:
        """When the S3 server was away."""
        return [(one.at, one.until) for one in self.strikes if one.victim is Victim.S3]

    @property
    def driver_kills(self) -> int:
        """Kills of the driver."""
        return sum(one.victim is Victim.DRIVER for one in self.strikes)

    def to_json(self) -> str:
        """For later looks; the generations are in the ledger."""
        deaths = [(pid, started, at) for (pid, started), at in self.deaths.items()]
        document = asdict(replace(self, generations=(), deaths={})) | {"deaths": deaths}
        return json.dumps(document, indent=1)

    def recovered_after(self, number: int) -> float | None:
        """Seconds from that strike to progress again; None if it was not seen."""
        found = first_progress(self.strikes[number], self.generations)
        return None if found is None else found - self.strikes[number].at


def first_progress(strike: Strike, generations: Sequence[Generation]) -> float | None:
    """When a generation was finished by an engine that did not work before the strike.

    A strike at the S3 server leaves the engines alone: the first one after its return counts.
    """
    before = {_engine(one) for one in generations if one.at <= strike.at}
    for one in generations:
        is_new = strike.victim is Victim.S3 or _engine(one) not in before
        if one.at > strike.until and is_new:
            return one.at
    return None


def _engine(one: Generation) -> tuple[int, float, int]:
    return (one.pid, one.started, one.engine)


class Watcher:
    """Reads the ledger, and notes when a process that wrote into it is gone."""

    def __init__(self, ledger: Path) -> None:
        self._reader = LedgerReader(ledger)
        self._alive: dict[Owner, psutil.Process | None] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self.deaths: dict[Owner, float] = {}
        self.last_progress = now()
        """When a generation was last seen to finish, or the watch began."""

    @property
    def generations(self) -> list[Generation]:
        """All so far."""
        return list(self._reader.generations)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks several times a second inside."""
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self._look()
        self._look()

    def _look(self) -> None:
        fresh = self._reader.read()
        if fresh:
            self.last_progress = now()
        for one in fresh:
            owner = (one.pid, one.started)
            if owner not in self._alive:
                self._alive[owner] = _process(owner)
        for owner, process in self._alive.items():
            if owner not in self.deaths and not _runs(process):
                self.deaths[owner] = now()


def _process(owner: Owner) -> psutil.Process | None:
    try:
        process = psutil.Process(owner[0])
    except psutil.NoSuchProcess:
        return None
    return process if abs(process.create_time() - owner[1]) < _SAME_START_S else None


def _runs(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.is_running() and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


class Driver:
    """The job's process, started again and again."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._starts: list[float] = []
        self.exits: list[int] = []
        self.results: list[Mapping[str, Any] | None] = []

    def start(self) -> None:
        """Start the command once more."""
        self._starts.append(now())
        base = self._job.folder / f"start-{len(self.exits):02d}"
        with base.with_suffix(".out").open("wb") as out, base.with_suffix(".log").open("wb") as err:
            self._process = subprocess.Popen(
                self._job.command, stdout=out, stderr=err, env=dict(self._job.environment)
            )

    def starts_since(self, at: float) -> int:
        """How often it was started after that time."""
        return sum(start > at for start in self._starts)

    @property
    def pid(self) -> int:
        """Of the running process, or the last one."""
        assert self._process is not None
        return self._process.pid

    def ended(self) -> bool:
        """Whether it is not running; its exit code and result are in the lists then."""
        if self._process is None:
            return True
        code = self._process.poll()
        if code is None:
            return False
        self._process = None
        out = self._job.folder / f"start-{len(self.exits):02d}.out"
        self.exits.append(code)
        self.results.append(_last_json(out))
        return True

    def kill(self) -> None:
        """SIGKILL, and its status taken."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _last_json(path: Path) -> Mapping[str, Any] | None:
    lines = path.read_text(errors="replace").splitlines()
    try:
        found: Mapping[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return found


@dataclass
class Campaign:
    """One run under fire in ``cluster``."""

    cluster: LocalCluster
    job: Job
    rng: Random
    fire: Fire = field(default_factory=Fire)
    _strikes: list[Strike] = field(default_factory=list)
    _troubles: list[str] = field(default_factory=list)

    def run(self, targets: Sequence[Victim]) -> Story:
        """Start the job, kill ``targets`` in order, see the run to its end.

        Nothing is killed when the run ends early, and the run goes on when all are killed.
        """
        started = now()
        driver, watcher = Driver(self.job), Watcher(self.job.ledger)
        try:
            with watcher.watching():
                self._until_complete(driver, watcher, deque(targets))
                left_over = self._left_over()
        finally:
            driver.kill()
        errors = [str(one["error"]) for one in driver.results if one and one.get("error")]
        return Story(
            started=started,
            ended=now(),
            strikes=tuple(self._strikes),
            exits=tuple(driver.exits),
            errors=tuple(errors),
            result=driver.results[-1] if driver.results else None,
            generations=tuple(watcher.generations),
            deaths=dict(watcher.deaths),
            left_over=left_over,
            troubles=tuple(self._troubles),
        )

    def _until_complete(self, driver: Driver, watcher: Watcher, queue: deque[Victim]) -> None:
        driver.start()
        due: float | None = None
        while not self._is_over(driver, watcher):
            time.sleep(_TICK_S)
            if due is None and queue and self._goes_on(watcher.generations):
                due = now() + self.rng.uniform(*self.fire.pause_s)
            if due is not None and now() >= due and self._strike(queue[0], driver):
                queue.popleft()
                due = None

    def _is_over(self, driver: Driver, watcher: Watcher) -> bool:
        """Whether the run is complete or given up; a driver that ended otherwise starts again."""
        if driver.ended():
            log.info("the driver ended with %d", driver.exits[-1])
            if driver.exits[-1] in _COMPLETE:
                return True
            if driver.starts_since(watcher.last_progress) >= _MAX_IDLE_STARTS:
                self._troubles.append(f"{_MAX_IDLE_STARTS} starts without progress")
                return True
            time.sleep(self.fire.restart_s)
            driver.start()
        if now() - watcher.last_progress > self.fire.stuck_s:
            self._troubles.append(f"no progress for {self.fire.stuck_s:.0f} s")
            return True
        return False

    def _goes_on(self, generations: Sequence[Generation]) -> bool:
        if not self._strikes:
            return bool(generations)
        return first_progress(self._strikes[-1], generations) is not None

    def _strike(self, victim: Victim, driver: Driver) -> bool:
        """Kill one; whether there was one to kill."""
        match victim:
            case Victim.DRIVER:
                pid, where = driver.pid, "driver"
                at = now()
                driver.kill()
            case Victim.S3:
                pid, where = self.cluster.state.part("s3").record.pid, "s3"
                at = now()
                self._interrupt_s3()
            case _:
                found = self._choose(victim)
                if found is None:
                    return False
                pid, where = found.process.pid, found.node
                at = now()
                end = victims.terminate if victim in TERMINATED else victims.kill
                end(found.process)
        until = now() if victim is Victim.S3 else at
        self._strikes.append(Strike(victim, at, until, pid, where))
        log.info("kill %d: %s, pid %d of %s", len(self._strikes), victim, pid, where)
        if victim is Victim.RAYLET:
            self._replace_node(where)
        return True

    def _choose(self, victim: Victim) -> Found | None:
        state = self.cluster.state
        match victim:
            case Victim.REPLICA:
                found = victims.replicas(state)
            case Victim.ENGINE_CORE | Victim.ENGINE_CORE_TERM:
                found = victims.owned_engines(state, victims.ENGINE_CORE)
            case Victim.WORKER | Victim.WORKER_TERM:
                found = victims.owned_engines(state, victims.WORKER)
            case _:
                found = victims.with_replica(state, victims.raylets(state))
        return self.rng.choice(found) if found else None

    def _interrupt_s3(self) -> None:
        self.cluster.stop_s3()
        time.sleep(self.fire.outage_s)
        self.cluster.start_s3()

    def _replace_node(self, name: str) -> None:
        """What a scheduler does with a broken node: sweep it, and bring another."""
        time.sleep(self.fire.node_away_s)
        self.cluster.kill_node(int(name.removeprefix("node-")))
        log.info("%s is added in place of %s", self.cluster.add_node(), name)

    def _left_over(self) -> tuple[str, ...]:
        """Replicas and engines that stay although the driver is gone."""
        deadline = time.monotonic() + _LEFT_OVER_S
        while True:
            state = self.cluster.state
            found = [*victims.replicas(state), *victims.engine_processes(state, victims.ENGINE)]
            if not found or time.monotonic() > deadline:
                return tuple(f"{one.process.pid} ({one.title[:40]})" for one in found)
            time.sleep(_TICK_S)
