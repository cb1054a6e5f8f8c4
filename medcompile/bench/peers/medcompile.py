"""Ours: every artifact of the bundle, each variant on each target a contender of its own (`int8@openvino-cpu`).

With arrays in, the artifact alone runs, as a session loads it; with texts or images in, the session's own call does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from medcompile import backends, bundle
from medcompile.bench.peer import MODEL, TEXT, Answer, Batch, Job, Missing, Note, Peer, Runner
from medcompile.bench.peers._runner import FunctionRunner
from medcompile.bundle import Bundle
from medcompile.errors import UsageError
from medcompile.spec import Artifact

TASKS = ("embed", "token-classification", "sequence-classification", "fill-mask", "image", "text", "generate")
PLAIN = "+plain"
"""Ends the option of a decoder that guesses no tokens ahead."""


class Ours(Peer):
    name = "medcompile"
    title = "medcompile"
    tasks = TASKS
    clocks = (MODEL, TEXT)
    needs_source = False
    ours = True

    def missing(self, job: Job) -> Missing | None:
        if not job.bundle:
            return Missing("there is no bundle", "medcompile build RECIPE")
        return super().missing(job)

    def options(self, job: Job) -> tuple[str, ...]:
        found = bundle.read(job.bundle, check=False)
        ways = ("", PLAIN) if job.task == "generate" else ("",)
        return tuple(
            f"{a.variant}@{a.target.name}{way}" for a in found.artifacts if a.graph == job.task for way in ways
        )

    def open(self, job: Job) -> Runner:
        from medcompile.runtime.parallel import load_streamed

        found = bundle.read(job.bundle, check=False)
        name, _, target = job.option.removesuffix(PLAIN).partition("@")
        artifact = next(a for a in found.artifacts if (a.variant, a.target.name, a.graph) == (name, target, job.task))
        variant = found.variants[name].on(job.task)
        notes: dict[str, Note] = {
            "engine": artifact.target.backend,
            "device": artifact.target.device,
            "precision": str(variant.weights or variant.float_dtype),
            "float_precision": str(variant.compute.get("float", variant.float_dtype)),
            "artifact": "; ".join(artifact.notes),
            "evidence": str(artifact.verdict or "none"),
        }
        backend = backends.get(artifact.target.backend)
        notes["library"] = f"{artifact.target.backend} {backend.probe(target).version}"
        if job.clock == TEXT:
            return _session(job, name, target, notes)
        if job.task == "generate":
            return _decoder(job, found, artifact, notes)
        found.check(found.under(found.folder_of(artifact)))
        spec = found.graphs[job.task]
        executor = load_streamed(backend, found.root / artifact.path, spec, variant, artifact.target, job.threads)
        wanted = {tensor.name for tensor in spec.inputs}
        output = spec.outputs[0].name

        def run(batch: Batch) -> Answer:
            return Answer(executor.run({n: a for n, a in batch.feeds.items() if n in wanted})[output])

        return FunctionRunner(run, notes)


def _decoder(job: Job, found: Bundle, artifact: Artifact, notes: dict[str, Note]) -> Runner:
    import numpy as np

    from medcompile.runtime.generator import Generator
    from medcompile.runtime.prompts import DecoderText
    from medcompile.runtime.sampling import Sampling
    from medcompile.runtime.text import read_json

    size = int(read_json(found.root / "assets/decoder.json", dict)["block_size"])
    blocks = max(c.batch * (1 + (c.sequence + c.new) // size) for c in job.cells) + 1
    backend, variant = backends.get(artifact.target.backend), found.variants[artifact.variant]
    model = backends.load_decoder(backend, found.root / artifact.path, variant, job.threads, blocks)
    guess = {"guess": 0} if job.option.endswith(PLAIN) else {}
    generator = Generator(model, DecoderText.read(Path(found.root / "assets")), **guess)
    notes["speculation"] = not guess

    def run(batch: Batch) -> Answer:
        new = batch.cell.new
        asked = Sampling(max_tokens=new, ignore_eos=True)
        start = time.perf_counter_ns()
        requests = [generator.submit(ids.tolist(), asked) for ids in batch.feeds["input_ids"]]
        while any(r.sequence.length == r.sequence.prompt_length for r in requests):
            generator.step()
        first = time.perf_counter_ns()
        while generator.step():
            pass
        later = (time.perf_counter_ns() - first) // max(new - 1, 1)
        tokens = np.array([r.completion().token_ids for r in requests], np.int64)
        return Answer(tokens, first_ns=first - start, steps_ns=(later,) if new > 1 else ())

    return FunctionRunner(run, notes)


def _session(job: Job, variant: str, target: str, notes: dict[str, Note]) -> Runner:
    from medcompile.runtime.session import load

    session = load(job.bundle, backend=target, variant=variant, threads=job.threads)

    def classes(batch: Batch) -> Answer:
        import numpy as np

        scores = session.classify(batch.items)
        order = {label: k for k, label in enumerate(job.labels)}
        rows = [[s.score for s in sorted(row, key=lambda s: order[s.label])] for row in scores]
        return Answer(np.array(rows, np.float32))

    def entities(batch: Batch) -> Answer:
        found = session.extract(batch.items)
        return Answer(spans=tuple(tuple((e.start, e.end, e.label) for e in item) for item in found))

    calls: dict[str, Callable[[Batch], Answer]] = {
        "embed": lambda batch: Answer(session.embed(batch.items)),
        "token-classification": entities,
        "sequence-classification": classes,
        "image": lambda batch: Answer(session.embed_images(batch.items)),
        "text": lambda batch: Answer(session.embed_texts(batch.items)),
    }
    if job.task not in calls:
        raise UsageError(f"{job.task} has no timed call that starts from texts", fix="time it with --clock model")
    return FunctionRunner(calls[job.task], notes)


PEER = Ours()
