"""What a contender is: a Peer that says whether it can run here, prepares its files, and opens a Runner on a Job.

Types alone, and what every peer needs to answer "why not". Imports numpy and the standard library: this file is also
imported by interpreters that hold another engine's libraries (`--python PEER=PATH`). Who starts the processes is
harness.py; what happens inside one is worker.py.
"""

from __future__ import annotations

import importlib.util
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
Note = str | int | float | bool
Span = tuple[int, int, str]
"""An entity: first character, character after the last, label without B- or I-."""

MODEL, TEXT = "model", "text"
"""Clocks. MODEL: arrays in, the graph's outputs out. TEXT: what a user calls, tokenization (or reading and resizing
images) and the meaning of the outputs inside the clock."""


@dataclass(frozen=True)
class Cell:
    """One shape that is timed. batch: rows, or with the clock TEXT the items handed over in one call.

    sequence: tokens in a row (of its prompt, for decoders); 0 for images, and with the clock TEXT: as long as they are.
    new: tokens that a decoder must generate, exactly, whatever it says; 0 for encoders.
    """

    batch: int
    sequence: int = 0
    new: int = 0

    @property
    def name(self) -> str:
        """As on the command line: 8x128, 1x128+64, 8."""
        return f"{self.batch}" + (f"x{self.sequence}" if self.sequence else "") + (f"+{self.new}" if self.new else "")


@dataclass(frozen=True)
class Job:
    """What a contender is asked to run. JSON-able (medcompile.manifest's encode and decode).

    family: bert, clip, llama. task: embed, token-classification, sequence-classification, fill-mask, image, text,
        generate.
    source: the checkpoint's folder (transformers' or open_clip's layout); bundle: the compiled one. Empty: not there.
    option: which of Peer.options() this is. clock: MODEL or TEXT. cells: every shape that will be timed.
    threads: to compute with; the process is held to as many cores, cpus, before anything is imported.
    inputs: folder the batches are read from (worker.py does). calibration: an .npz of the graph's inputs, one item in
        each row, for those who calibrate; empty if there is none. It shares no item with inputs.
    work: folder of this contender's own, empty when prepare() begins and kept from run to run as it left it.
    pooling: mean or cls, of embed; normalize: the vectors have length 1 with the clock TEXT (MODEL: as the graph has
        them; the comparison is by cosine). max_length: in tokens. labels: by id.
    """

    family: str
    task: str
    source: str = ""
    bundle: str = ""
    option: str = ""
    clock: str = MODEL
    cells: tuple[Cell, ...] = ()
    threads: int = 1
    cpus: tuple[int, ...] = ()
    inputs: str = ""
    calibration: str = ""
    work: str = ""
    pooling: str = "mean"
    normalize: bool = True
    max_length: int = 512
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """What one run is given.

    feeds, with the clock MODEL: input_ids, attention_mask, token_type_ids int64 [batch, sequence] (fill-mask:
        mask_position int64 [batch]); pixel_values float32 [batch, 3, height, width] of images; of decoders input_ids
        alone, without padding. items, with the clock TEXT: texts, or the paths of images.
    """

    cell: Cell
    feeds: Mapping[str, Array] = field(default_factory=dict)
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What one run gave, for the accuracy column: on the host, in numpy.

    values: embed, image, text: vectors [batch, hidden]; fill-mask: logits [batch, vocabulary]; classification: logits
        [batch, sequence, labels] or [batch, labels] (with the clock TEXT: probabilities, in the order of job.labels);
        generate: token ids [batch, new], greedy.
    spans: token-classification with the clock TEXT, per item.
    first_ns, steps_ns: of decoders, from the call until the first token of every row is known, and of each later step.
    """

    values: Array | None = None
    spans: tuple[tuple[Span, ...], ...] = ()
    first_ns: int = 0
    steps_ns: tuple[int, ...] = ()


class Runner(Protocol):
    """A contender that has its model loaded. notes: what it decided (threads, precision, batch size, fusions)."""

    @property
    def notes(self) -> Mapping[str, Note]: ...

    def run(self, batch: Batch) -> Answer:
        """One run: the time from this call to its return is what is measured, so everything must be computed then."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Missing:
    """Why a contender does not run. fix: a command that would change that, or a sentence; empty if nothing would."""

    reason: str
    fix: str = ""


class Peer(ABC):
    """One way to run a model. A file of peers/ sets these and makes one PEER.

    name: the file's. title: as tables call it. tasks, clocks: what it can do. modules: what must be importable, by
    import name, with the install line of each. device: cpu or cuda. needs_source: it reads the checkpoint.
    ours: runs what this compiler built. reference: accuracy and ratios are told against it, unless told otherwise.
    engine: whose kernels run (openvino, onnxruntime, torch, llama.cpp ...). precision: of the linear layers' weights,
        float_precision: of the rest (float32, bfloat16, float16, int8, int4). What only open() can tell, Runner.notes
        says under the same names (engine, precision, float_precision, device).
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    clocks: tuple[str, ...] = (MODEL,)
    modules: Mapping[str, str] = {}
    engine: str = ""
    precision: str = "float32"
    float_precision: str = "float32"
    device: str = "cpu"
    needs_source: bool = True
    ours: bool = False
    reference: bool = False

    def options(self, job: Job) -> tuple[str, ...]:
        """The ways that it can run the job, each a contender of its own (job.option). One, nameless, by default."""
        return ("",)

    def missing(self, job: Job) -> Missing | None:
        """Why it can't run this job here; None if nothing is known to stand in the way. Cheap: imports nothing heavy.

        Runs in the interpreter that the contender would run in.
        """
        if job.task not in self.tasks:
            return Missing(f"does not run {job.task}")
        if job.clock not in self.clocks:
            said = " and ".join(self.clocks)
            return Missing(f"has no clock {job.clock!r}, only {said}", fix=f"--clock {self.clocks[0]}")
        for module, install in self.modules.items():
            if not importable(module):
                return Missing(f"{module} is not installed", fix=install)
        if self.device == "cuda" and not has_cuda():
            return Missing("no NVIDIA GPU here", fix="run this on a machine with one")
        if self.needs_source and not job.source:
            return Missing("the model's checkpoint is not on this machine", fix="bench the recipe, or --source FOLDER")
        return None

    def prepare(self, job: Job) -> None:  # noqa: B027  most have nothing to prepare
        """Convert, export or quantize into job.work. Runs in a process of its own, before any timing, once for each
        checkpoint, option, calibration and versions of self.modules. An error is told in the table."""

    @abstractmethod
    def open(self, job: Job) -> Runner:
        """Import what is heavy and load the model. The time of this call is the load time."""


def importable(module: str) -> bool:
    """Whether that module is installed; its parents may be imported, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def has_cuda() -> bool:
    """Whether the driver shows an NVIDIA device. Asks no library."""
    if platform.system() == "Linux":
        return Path("/dev/nvidiactl").exists() and any(Path("/dev").glob("nvidia[0-9]*"))
    return False


def calibration_feeds(job: Job) -> list[dict[str, Array]]:
    """The items of job.calibration, each as the feeds of one row, without padding; [] if there are none."""
    if not job.calibration:
        return []
    with np.load(job.calibration, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    mask = arrays.get("attention_mask")
    items = []
    for i in range(len(next(iter(arrays.values())))):
        row = {name: array[i : i + 1] for name, array in arrays.items()}
        if mask is not None:
            length = int(mask[i].sum())
            row = {k: v[:, :length] if v.shape[1:] == mask.shape[1:] else v for k, v in row.items()}
        items.append(row)
    return items
