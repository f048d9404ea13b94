"""The main job: a model in, a smaller GGUF out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from a3q import __version__, ranks, runtime
from a3q.asked import Asked
from a3q.calibration import SELF
from a3q.components import Method
from a3q.dimensions import HEADS, Grid, Plan, Request
from a3q.errors import InputError, named
from a3q.families import Component
from a3q.footprint import CACHE_BLOCK, Footprint, Use, footprint, limits
from a3q.forecast import before_conversion, check_cache, check_kv_ratio, grid_for, stored_as
from a3q.gguf_types import Settled, TypeRequest, TypeSettler
from a3q.heal.settings import Healing
from a3q.model import Model, pick_device
from a3q.ollama import check_name, create_in_ollama
from a3q.pipeline import Prepared, Reduced, hash_source, run, timed
from a3q.pipeline import Settled as Job
from a3q.progress import Stages, share_of, silent, to_share
from a3q.provenance import is_outdated, provenance, rounding_facts
from a3q.ranks import first_before_others
from a3q.reduce import OnFinished
from a3q.report_html import check_reports, write_reports
from a3q.result import Result, Rounding, StoredTensor, mark, mean_losses, stem_of
from a3q.settings import Settings, identity
from a3q.solve.grid import GRIDS
from a3q.store import Finished
from a3q.verify import Verification, allowed_kl, verify
from a3q.work import draft_of, opened, placed
from converters import gguf_split
from converters.budget import Limit
from converters.draft import draft_folder
from converters.gguf_keys import as_keys
from converters.gguf_target import check_runtime
from converters.gguf_writer import GGUFStream, WrittenFile, check_output, header_size
from converters.headers import Header, open_header
from converters.modelfile import check_modelfile, write_modelfile
from converters.open import open_model


def convert(
    model: str | Path | None = None,
    *,
    ratio: float | None = None,
    quant: str | None = None,
    quantizer: str | None = None,
    strict: bool = False,
    bits: float | None = None,
    size: int | None = None,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    output: str | Path | None = None,
    components: Iterable[Component] | None = None,
    own_ratios: Mapping[Component, float] | None = None,
    kv_ratio: float | None = None,
    kv_type: str | None = None,
    context: int | None = None,
    parallel: int = 1,
    fit: int | None = None,
    plan: str | Path | None = None,
    ranks: str | None = None,
    method: str = "a3q",
    heal: str = "none",
    heal_tokens: int | None = None,
    heal_minutes: float | None = None,
    heal_quant: bool = False,
    calib: str | Sequence[str] = SELF,
    calib_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    verify_file: bool = True,
    split_max_size: int | None = None,
    ollama: str | None = None,
    report: bool = False,
    force: bool = False,
    pre: str | None = None,
    memory_budget: int | None = None,
    work: str | Path | None = None,
    stages: Stages = silent,
) -> Result:
    """Reduce `model` by `ratio`, quantize it, write it as GGUF, and check the file in llama.cpp.

    `model`: a Hugging Face folder (a3q's own among them), a GGUF, a hub name, or None for the demo model. `ratio`: 0.25
    unless told, and nothing beside `kv_ratio`, the share of the KV cache that is to go. `quant`: one of llama.cpp's
    types or mixes, or `4bit` (the default) and the like; `quantizer`: `gptq`, `rtn` or `plain`, see
    `a3q.gguf_types.TypeRequest`; `strict`: InputError where a tensor's rows do not fit its type. `bits` (mean of a
    weight) or `size` (bytes of the file): choose the types within it instead; the last two types are of single tensors.
    `components`: those to reduce, all that llama.cpp can hold unless told; `own_ratios` sets some apart. `kv_type`: of
    the cache that the file must start with; `context` (the trained one unless told) and `parallel`: how it will be run.
    `fit`: bytes of memory that running it may take, for which everything else is chosen; `plan`: a file of `a3q plan`.
    `ranks`: `mixed` or `uniform`. `heal`: `blocks`, `full` or `both`, how the reduced model is trained on `heal_tokens`
    tokens and for at most `heal_minutes`, `heal_quant`: with the rounding in the loop at its end, see
    `a3q.heal.settings.Healing`. `calib`: `self`, a text or jsonl file, a data set's name, or several of these, which
    share the tokens evenly. `split_max_size`: bytes of tensors in one file of several. `ollama`: name of the model to
    make in Ollama. `report`: write one beside the file. `memory_budget`: bytes that hidden states and finished
    layers may take before they wait on disk, half of the free memory unless told. `work`: folder that keeps what is
    finished, so that the same call continues after whatever ended this one. Several processes of torchrun work on one
    model together, see `a3q.ranks`. InputError for what cannot be used, VerifyError for a file that is not as it should
    be.
    """
    asked = Asked(ratio, own_ratios, kv_ratio, components, ranks, quant, kv_type, context, parallel, fit, plan)
    asked.check(bits is not None or size is not None)
    settings = asked.settings(
        method=method,
        calib=calib,
        calib_tokens=calib_tokens,
        seed=seed,
        device=device,
        memory_budget=memory_budget,
        work=work,
        healing=Healing(heal, heal_tokens, heal_minutes, heal_quant),
    )
    overrides = output_tensor_type, token_embedding_type
    request = TypeRequest(asked.quant_plan(*overrides), quantizer, strict, _limit(bits, size))
    request.check()
    if split_max_size is not None:
        gguf_split.check_limit(split_max_size)
    if ollama is not None:
        check_name(ollama, split_max_size is not None)
    pick_device(device)
    split = split_max_size is not None
    if output is not None:
        _check_outputs(Path(output), split, ollama is not None, report, force, settings.work)
    seconds: dict[str, float] = {}
    stages = timed(stages, seconds)
    notes: list[str] = []
    if verify_file and not runtime.available():
        verify_file = False
        notes.append('not verified: llama.cpp is not installed; pip install "a3q[verify]" to check written files')

    header = first_before_others(partial(open_header, model, pre))
    settings, request, use = asked.settled(header, request, settings)
    original = first_before_others(partial(open_model, model, pre))
    check_runtime(original)
    path = Path(output) if output is not None else Path(default_name(original, settings.request(), request))
    _check_outputs(path, split, ollama is not None, report, force, settings.work)
    result = convert_opened(original, header, settings, request, use, path, verify_file, split_max_size, None, stages)
    result = replace(result, notes=(*notes, *result.notes), seconds=seconds)
    if ollama is not None:
        result = _into_ollama(ollama, result, use, force, stages)
    if report:
        result = replace(result, reports=write_reports(result))
    return result


def convert_opened(
    original: Model,
    header: Header,
    settings: Settings,
    request: TypeRequest,
    use: Use,
    path: Path,
    verify_file: bool,
    split_max_size: int | None,
    prepared: Prepared | None,
    stages: Stages,
) -> Result:
    """`convert` for a model that is open, with everything settled; what is in `prepared` is not done again.

    `path` is replaced if it is there.
    """
    grid = grid_for(original, request, use.cache_type)
    _check_method(original, settings, grid)
    _check_healing(settings, request)
    check_kv_ratio(original, settings.request(), grid)
    shrinks = bool(settings.request().reduced & HEADS & grid.components)
    if not shrinks or not any(n % CACHE_BLOCK == 0 for n in grid.sizes(original.config, original.config.widest, "QK")):
        check_cache(original.config, use.cache_type, grid.components >= HEADS)
    # One list of frequencies for all heads is what a stock runtime holds.
    how = Method(settings.method, "shared")
    reducing, cache_only = bool(settings.request().groups()), settings.request().cache_only
    settler = TypeSettler(original, request, reducing, header_size, cache_only)
    ranks.alone(settler.check)
    # llama.cpp is needed where the file is written.
    verify_file = ranks.same_object(verify_file)
    digests = prepared.digests if prepared is not None else hash_source(original.source, stages)
    with ExitStack() as stack:
        facts = identity(settings, digests, pick_device(settings.device).type) | request.facts()
        work = stack.enter_context(opened(settings.work, {**facts, "--kv-type": use.cache_type}))
        # Whatever fails from here on, nothing stands under the final name.
        folder = path.parent
        if ranks.first():
            scratch = None if settings.work is None else draft_of(path, settings.work)
            folder = stack.enter_context(draft_folder(path, ".unverified", scratch))
        unverified = folder / path.name
        stack.enter_context(named(unverified, path))
        output = _Output(settler, settings, unverified, split_max_size, stack)
        reduced = run(original, settings, grid, how, verify_file, stages, settler, prepared, work, output.open, digests)
        if not ranks.first():
            raise ranks.Helped
        assert settler.settled is not None
        written = output.finish(reduced, stages)
        verification = None
        if verify_file:
            with named(written.path, path):
                device = pick_device(settings.device)
                verification = _verify(reduced, settler.settled, written.path, device, stages)
        if work is not None:
            work.keep_output(written.files)
        split = split_max_size is not None
        files = gguf_split.place(written.files, path) if split else (written.path.replace(path),)
    footprints = _footprints(header, reduced, settler.settled, written.size, use)
    return Result(
        path=files[0],
        job=reduced,
        written=replace(written, path=files[0], files=files),
        type_name=_type_name(request),
        rounding=_rounding(reduced, settler.settled),
        verification=verification,
        notes=(*reduced.notes, *written.notes, *limits(footprints["before"], footprints["after"])),
        settings=settings,
        use=use,
        footprints=footprints,
    )


def _check_outputs(path: Path, split: bool, ollama: bool, report: bool, force: bool, work: Path | None) -> None:
    """InputError for anything that stands in the way of what is to be written.

    What this very run has written before it was killed, even at its end, is in nobody's way.
    """
    own = placed(
        work, gguf_split.existing(path) if split and path.parent.is_dir() else [path] if path.is_file() else []
    )
    check_output(path, force or own, split)
    if ollama:
        check_modelfile(path, force)
    if report:
        check_reports(path, force or own)


def _into_ollama(name: str, result: Result, use: Use, force: bool, stages: Stages) -> Result:
    """Write the Modelfile, and make the model in the server if one answers."""
    model = result.original
    modelfile = write_modelfile(
        result.path, model.tokenizer, model.metadata, model.source.path, context=use.context, force=force
    )
    written = result.written
    assert isinstance(written, WrittenFile)
    with stages("create in Ollama", 1.0) as advance:
        outcome = create_in_ollama(name, result.path, modelfile, to_share(advance), digest=written.sha256[0])
    return replace(result, ollama=outcome, notes=(*result.notes, *modelfile.notes))


def _footprints(header: Header, reduced: Reduced, settled: Settled, size: int, use: Use) -> dict[str, Footprint]:
    """What running it takes, before and after."""
    model = reduced.model
    stored = [stored_as(entry, settled.types) for entry in settled.tensors]
    after = footprint(model.family, model.config, stored, size, model.parameters(), use)
    return {"before": before_conversion(header, use), "after": after}


def _limit(bits: float | None, size: int | None) -> Limit | None:
    if bits is not None and size is not None:
        raise InputError("--bits and --size: give one of the two")
    return None if bits is None and size is None else Limit(size, bits)


def _type_name(request: TypeRequest) -> str:
    limit = request.limit
    if limit is None:
        return request.plan.name.upper()
    return f"{limit.bits:g}bpw" if limit.bits is not None else "mixed"


def default_name(model: Model, reduction: Request, request: TypeRequest) -> str:
    """File name in the current folder: the source's without its type, what goes, and the new type."""
    return f"{stem_of(model)}{mark(reduction)}-{_type_name(request)}.gguf"


def _rounding(reduced: Reduced, settled: Settled) -> Rounding | None:
    types: dict[str, Counter[str]] = defaultdict(Counter)
    tensors, losses = [], reduced.reduction.rounding_losses
    for entry in settled.tensors:
        kind = settled.types.kinds[entry.name]
        loss = None
        if len(entry.shape) > 1 and kind.name.lower() in GRIDS:
            for role in entry.roles:
                types[role.name][kind.name] += 1
            if entry.layer is not None and losses:
                # The roles of one tensor have one type, so they were rounded together.
                loss = losses[entry.layer].get(entry.roles[0].name)
        tensors.append(
            StoredTensor(entry.name, entry.layer, entry.short_name, kind.name, entry.weights, entry.bytes(kind), loss)
        )
    if not types:
        return None
    bits = settled.types.bits_per_weight(settled.tensors)
    return Rounding(settled.quantizer, bits, mean_losses(losses), types, tensors)


def _check_method(model: Model, settings: Settings, grid: Grid) -> None:
    rotated = any(shape.pairs for shape in model.config.layers)
    if settings.method == "paper" and rotated and "QK" in settings.request().reduced & grid.components:
        raise InputError(
            "--method paper: the paper's QK gives every key head its own RoPE frequencies, which no stock GGUF runtime "
            "holds; take --components mlp, or write a Hugging Face folder with a3q reduce"
        )


def _check_healing(settings: Settings, request: TypeRequest) -> None:
    rounded = request.limit is not None or request.plan.matrix.name.lower() in GRIDS
    if settings.healing.quant and (request.quantizer == "plain" or not rounded):
        raise InputError(
            "--heal-quant: the layers are not rounded by gptq or rtn, so there is no rounding to train with; leave it "
            "out, or change --quant or --quantizer"
        )


@dataclass
class _Output:
    """The file that is written while the layers are finished."""

    settler: TypeSettler
    settings: Settings
    path: Path
    split_max_size: int | None
    stack: ExitStack
    """Closes it."""
    stream: GGUFStream | None = None

    def open(self, job: Job) -> OnFinished:
        """A `Writer` of `a3q.pipeline`."""
        settled = self.settler.settled
        assert settled is not None
        facts = {
            **provenance(job, self.settings, __version__),
            "quantization": _type_name(self.settler.request).lower(),
            "quantizer": settled.quantizer,
            **(rounding_facts(job, self.settings) if settled.quantization is not None else {}),
        }
        base, asked = str(facts["source.name"]), job.plan.asked
        what = "A3Q KV" if job.plan.request.cache_only else "A3Q"
        name = base if asked == 0 else f"{base} {what} {asked:.0%}"
        if "general.base_model.count" not in job.original.metadata and asked > 0:
            base_model = {"general.base_model.count": 1, "general.base_model.0.name": base}
        else:
            base_model = {}
        fields = as_keys({**{f"a3q.{key}": value for key, value in facts.items()}, **base_model})
        stream = GGUFStream(
            replace(_still_true(job.original, job.plan), config=job.config),
            self.settler.request.plan,
            self.path,
            name=name,
            provenance=fields,
            types=settled.types,
            split_max_size=self.split_max_size,
        )
        self.stream = self.stack.enter_context(stream)
        packed = self.settler.packer()

        def put(i: int, finished: Finished) -> None:
            stream.write_layer(i, finished.layer, partial(packed, i, finished.blocks))

        return put

    def finish(self, reduced: Reduced, stages: Stages) -> WrittenFile:
        """All that the pass over the layers has left, which is everything if there was none."""
        stream, original = self.stream, reduced.original
        assert stream is not None
        model = _still_true(reduced.model, reduced.plan)
        with stages("write", 1.0) as advance:
            share = share_of(advance)
            if reduced.model is original:
                packed = self.settler.packer()
                for i, layer in enumerate(original.layers):
                    stream.write_layer(i, layer, partial(packed, i, {}))
                    share(stream.written, stream.total)
            stream.write_top(model, partial(self.settler.packer(), None, reduced.reduction.top))
            share(stream.written, stream.total)
            return stream.finish(model)


def _still_true(model: Model, plan: Plan) -> Model:
    """Without what the source says of weights that are now others: how they were rounded, or healed."""
    kept = {k: v for k, v in model.metadata.items() if not is_outdated(k.removeprefix("a3q."), plan)}
    return replace(model, metadata=kept)


def _verify(reduced: Reduced, settled: Settled, path: Path, device: torch.device, stages: Stages) -> Verification:
    assert reduced.calibration is not None
    original, sequences = reduced.original, reduced.calibration.held_out
    in_memory = 1 if reduced.model is original else 2
    work = in_memory * original.config.num_hidden_layers + 2 * len(sequences)
    allowed = allowed_kl(settled.types.kinds.values(), settled.rounded)
    with stages("verify in llama.cpp", work) as advance:
        return verify(path, original, reduced.model, allowed, sequences, device, advance)
