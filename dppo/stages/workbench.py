"""What every stage works with: the cache, the device, the processes, and the lines that the user reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from dppo import stopping
from dppo.allocator import give_back
from dppo.artifacts import Build, Cache, Slot, Store
from dppo.processes import broadcast, gather
from dppo.types import Artifact, Json

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dppo.attention import Kernel
    from dppo.config import TrainSettings

_log = logging.getLogger("dppo")
_SECONDS_PER_SHARD = 30.0
# In a manifest, for stages that train nothing: how many responses or prompts its seconds were spent on.
WORK = "work"

Row = TypeVar("Row")
T = TypeVar("T")
Keep = Callable[[Mapping[str, Row]], None]
"""Takes finished rows of a store, to be committed in shards."""


@dataclass(frozen=True)
class Pace:
    """How fast a model answered: ``tokens`` of all its answers, their end tokens included, in so many ``seconds``.

    Loading the model and starting an engine are not in them.
    """

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)  # a clock may stand still


@dataclass
class Record:
    """What a run did at one stage: how long it took, and whether the cache had it.

    ``title`` is what is printed; ``stage`` is where it lies in the cache: y_gen and both models' answers share one.
    ``rows`` is how many a growing store got from this run, None for an artifact; ``pace`` is that of rows which a model
    wrote. ``memory`` {estimated, measured, tokens_per_micro_batch} is the peak of a stage that trains or scores, in
    bytes.
    """

    title: str
    stage: str
    fingerprint: str
    seconds: float
    reused: bool
    rows: int | None = None
    pace: Pace | None = None
    memory: Json = None


@dataclass
class Workbench:
    """One run's view of the cache; ``records`` grow as stages finish."""

    cache: Cache
    accelerator: Accelerator
    records: list[Record] = field(default_factory=list)
    on_record: Callable[[], None] = lambda: None
    memory: Json = None  # of the stage in progress

    @property
    def device(self) -> torch.device:
        return cast("torch.device", self.accelerator.device)

    @property
    def is_main(self) -> bool:
        """Only the main process prints, and writes what is one for all; rows of a store every process writes."""
        return bool(self.accelerator.is_main_process)

    def numerics(
        self, precision: str, packing: Literal["packed", "padded"] | None = None, kernel: Kernel = "sdpa"
    ) -> dict[str, Json]:
        """What decides the rounding of log-probs: part of the fingerprint of every stage that runs a model."""
        import torch

        inside_bf16 = (precision, packing, self.device.type) == ("bf16", "packed", "cpu")
        return {
            "precision": precision,
            "packing": packing,
            "attention": "sdpa in fp32" if inside_bf16 else kernel,
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "device": self.device.type,
        }

    def training_numerics(self, settings: TrainSettings) -> dict[str, Json]:
        """The same for what trains, and for whatever is compared with it. Raises UserError."""
        own = self.numerics(settings.precision, settings.packing, settings.kernel(self.device.type))
        return {**own, "compiled": True} if settings.compile else own

    def say(self, line: str) -> None:
        if self.is_main:
            _log.info("%s", line)

    def warn(self, line: str) -> None:
        if self.is_main:
            _log.warning("warning: %s", line)

    @contextmanager
    def working(self, title: str, entry: Slot | Store[Any], *, reuse: bool, detail: str) -> Iterator[Record]:
        """Say what happens at a stage, time it and record it; the record is complete when the block is left."""
        verb = "reuse" if reuse else "build"
        why = detail if reuse else f"{detail}; {entry.reason()}" if detail else entry.reason()
        self.say(f"{verb} {title:<10} {entry.fingerprint[:4]}  {why}")
        started = time.perf_counter()
        record = Record(title, entry.stage, entry.fingerprint, 0.0, reuse)
        self.memory = None
        yield record
        give_back()  # a stage needs little of what the one before it freed, and other processes may
        record.memory = self.memory
        record.seconds = round(time.perf_counter() - started, 3)
        self.records.append(record)
        self.on_record()

    def artifact(self, title: str, slot: Slot, detail: str, build: Callable[[Build], None]) -> Artifact:
        """Reuse a complete artifact or build it.

        Every process of the run enters ``build``; the main one decides, holds the lock and commits.
        """
        if not self.is_main:
            return self._join(slot, build)

        def together(started: Build) -> None:
            self._share(started)
            build(started)

        reuse = slot.complete()
        with nullcontext() if reuse else slot.lock(self.say):
            reuse = reuse or slot.complete()  # another run may have built it while this one waited
            with self.working(title, slot, reuse=reuse, detail=detail):
                if reuse:
                    self._share(None)
                try:
                    artifact = slot.get_or_build(together, self.say)
                finally:
                    stopping.go_on()
        gather(self.accelerator, None)
        return artifact

    def _share(self, started: Build | None) -> None:
        """Tell the other processes where to build; None: nothing is to be built."""
        broadcast(self.accelerator, [None, None] if started is None else [str(started.directory), str(started.work)])

    def _join(self, slot: Slot, build: Callable[[Build], None]) -> Artifact:
        """The part of a process that is not the main one."""
        directory, work = broadcast(self.accelerator, [None, None])
        try:
            if directory is not None:
                build(Build(Path(directory), Path(work)))
        finally:
            stopping.go_on()
        gather(self.accelerator, None)
        return slot.artifact(reused=directory is None)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process does of work that is in the order of its size: all get as much of each size."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def fill(
        self,
        title: str,
        store: Store[Row],
        keys: Sequence[str],
        detail: str,
        todo: str,
        compute: Callable[[list[str], Keep[Row]], Pace | None],
        *,
        rows_per_shard: int,
        alone: bool = False,
    ) -> Artifact:
        """Have ``compute(missing keys, keep)`` make the rows that a store lacks.

        Every process enters it, makes its ``share`` and commits that itself; with ``alone`` the main one makes all.
        ``keep(rows)`` commits a shard when it has ``rows_per_shard`` rows or the last one is 30 seconds old: that is
        what a kill can cost. What an exception interrupts is committed too. ``compute`` returns its pace if it has one.
        """

        def together(missing: list[str]) -> Pace | None:
            pace = None
            if missing and (self.is_main or not alone):
                with shards(store, rows_per_shard) as keep:
                    pace = compute(missing, keep)
            paces = [one for one in gather(self.accelerator, pace) if one is not None]
            return Pace(sum(one.tokens for one in paces), max(one.seconds for one in paces)) if paces else None

        if not self.is_main:
            (missing,) = broadcast(self.accelerator, [None])
            together(missing)
            return store.artifact(reused=not missing)
        missing = store.missing(keys)
        with store.lock(self.say) if missing else nullcontext():
            missing = store.missing(keys) if missing else []  # another run may have filled it in the meantime
            told = f"{detail}, {len(missing)} {todo}" if missing else detail
            with self.working(title, store, reuse=not missing, detail=told) as record:
                record.rows = len(missing)
                broadcast(self.accelerator, [missing])
                record.pace = together(missing)
        return store.artifact(reused=not missing)


@contextmanager
def shards(store: Store[Row], rows_per_shard: int) -> Iterator[Keep[Row]]:
    """Commits what ``keep`` is given in shards, when they are full or 30 seconds old, and at the end."""
    pending: dict[str, Row] = {}
    committed = time.monotonic()

    def keep(rows: Mapping[str, Row]) -> None:
        nonlocal pending, committed
        pending |= rows
        if len(pending) >= rows_per_shard or time.monotonic() - committed > _SECONDS_PER_SHARD:
            store.append(pending)
            pending, committed = {}, time.monotonic()

    try:
        yield keep
    finally:
        if pending:
            store.append(pending)
