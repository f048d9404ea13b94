"""Reduce a model's inner dimensions, layer by layer: what is done to each is in `a3q.reduce_layer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from a3q import ranks
from a3q.ahead import behind, fetched
from a3q.batching import Batches, out_of_memory
from a3q.components import Method, spread_norms
from a3q.errors import InputError
from a3q.fit import InputMoments
from a3q.forward import compute_dtype, embed, lowered, norm, to_device
from a3q.heal.blocks import BlockLimit, BlockLoss, Distance, PredictionDistance, Shares, heal_block, relative_distance
from a3q.model import Layer, LayerShape, Model, ModelConfig
from a3q.quantize import LayerRounding, Quantization
from a3q.reduce_layer import Dimensions, Streams, pass_on, reduce_fitted, reduce_plainly, scaled
from a3q.room import Room
from a3q.solve.grid import Blocks
from a3q.store import Finished, LayerLosses, LayerStore
from a3q.stream import Stream

FITTED_TOKENS = 1 << 17
"""Of the text, what layers are fitted to that are trained on all of it afterwards. To fit SmolLM2's to 320 × 1024
tokens took 2 cores 20 of 67 minutes."""


def planned(config: ModelConfig, dimensions: Sequence[Dimensions]) -> ModelConfig:
    """`config` with these dimensions; which RoPE frequencies stay is not known yet, only how many."""
    shapes = []
    for shape, new in zip(config.layers, dimensions, strict=True):
        pairs = shape.pairs * new.qk_head_dim // shape.qk_head_dim
        frequencies = tuple(one[:pairs] for one in shape.frequencies)
        shapes.append(LayerShape(**vars(new), frequencies=frequencies, sliding_window=shape.sliding_window))
    return dataclasses.replace(config, layers=tuple(shapes))


@dataclass(frozen=True)
class Reduction:
    """A reduced model, and what each layer lost."""

    model: Model
    losses: list[LayerLosses]
    layers: LayerStore | None = None
    """The reduced layers with what was rounded in them; None where the model is the original itself."""
    top: Mapping[str, Blocks] = field(default_factory=dict)
    """What was rounded outside the layers."""
    rounding_losses: Sequence[Mapping[str, float]] = ()
    """Share of the output energy that rounding cost each weight of each layer, by role."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it went."""

    def blocks(self, layer: int | None, role: str) -> Blocks | None:
        """A rounded weight (`layer` None: outside the layers); None where it was not rounded."""
        if layer is None:
            return self.top.get(role)
        return None if self.layers is None else self.layers.blocks(layer).get(role)


OnFinished = Callable[[int, Finished], None]
"""Called with each layer in turn, from another thread on a GPU. Of rounded weights it has the blocks only."""


@torch.inference_mode()
def reduce(
    model: Model,
    tokens: Tensor,
    dimensions: Sequence[Dimensions],
    device: torch.device,
    memory_budget: int,
    method: Method = Method(),  # noqa: B008 (immutable)
    on_layer: Callable[[], None] = lambda: None,
    quantization: Quantization | None = None,
    mlp_stays: bool = False,
    healing: BlockLimit | None = None,
    seed: int = 0,
    *,
    folder: Path | None = None,
    on_finished: OnFinished = lambda i, finished: None,
    for_all: bool = False,
) -> Reduction:
    """`model` with each layer under its `dimensions`, and rounded if so told, calibrated on `tokens` `[B, T]`.

    Hidden states and reduced layers beyond `memory_budget` bytes wait on disk. With `mlp_stays` an MLP is only touched
    to be rounded; otherwise it is fitted to the attention before it even where its size stays. In a `folder` all
    finished layers are kept, and those that an earlier run has left there are not done again: the hidden states pass
    through them, so that the result is the same. With `healing` each layer is trained when it is reduced, see
    `a3q.heal.blocks`; nothing is rounded then.

    Over several processes (`a3q.ranks`) each takes its share of the sequences; the first alone has the layers after,
    unless they are `for_all`.
    InputError for activations that are no numbers and where memory or disk are not enough, ValueError for rounding with
    a `method` that fits nothing.
    """
    if len(dimensions) != model.config.num_hidden_layers:
        raise ValueError(f"dimensions of {len(dimensions)} layers for {model.config.num_hidden_layers}")
    if quantization is not None and not method.fitted:
        raise ValueError(f"method {method.name} does not follow what rounding does to the layers before")
    if healing is not None and (quantization is not None or not method.fitted):
        raise ValueError("layers that are healed are rounded in another pass, and fitted before")
    normed_apart = model.config.qk_norm == "head" and any(
        new.qk_head_dim < old.qk_head_dim for new, old in zip(dimensions, model.config.layers, strict=True)
    )
    config = dataclasses.replace(model.config, qk_norm="heads") if normed_apart else model.config
    rounding = quantization or Quantization([{}] * model.config.num_hidden_layers)
    untouched = _untouched(model.config, dimensions, rounding)
    task = _Task(model, config, method, rounding, mlp_stays, healing, seed, untouched)
    run = _Run(task, device, Room(memory_budget, device, folder))
    left = ranks.alone(lambda: LayerStore(run.room.left, folder))
    store = LayerStore(run.room.left) if left is None else left
    top = run.begin(tokens, store)
    layers: list[Finished] = []

    def load(i: int) -> Layer:
        w = to_device(model.layers[i], device)
        if normed_apart:
            # The forward pass makes the same of copies, so both streams may run on them.
            spread_norms(model.config, w)
        return w

    done = ranks.same_object(len(store))
    beside = device.type == "cuda"
    with behind(beside) as later:
        loads = [partial(load, i) for i in range(len(dimensions))]
        for i, (shape, target, w) in enumerate(
            zip(model.config.layers, dimensions, fetched(loads, beside), strict=True)
        ):
            finished = _again(run, store, i, shape, w) if i < done else run.layer(i, shape, target, w)
            layers.append(dataclasses.replace(finished, layer={}, blocks={}))
            if ranks.first() or for_all:
                later(partial(_put_away, store, i, finished, on_finished))
            on_layer()
    outside = run.finish(top, store)
    found = dataclasses.replace(
        model,
        config=dataclasses.replace(config, layers=tuple(one.shape for one in layers)),
        layers=store,
        top=top,
    )
    losses, rounding_losses = [one.losses for one in layers], [one.rounding_losses for one in layers]
    return Reduction(found, losses, store, outside, rounding_losses, tuple(run.notes()))


def _untouched(config: ModelConfig, dimensions: Sequence[Dimensions], quantization: Quantization) -> int:
    """Layers in front that stay as they are, with nothing changed before them."""
    if "embed" in quantization.top and not config.tie_word_embeddings:
        return 0
    count = 0
    for shape, target, grids in zip(config.layers, dimensions, quantization.layers, strict=True):
        if target != Dimensions.of(shape) or grids:
            break
        count += 1
    return count


def _put_away(store: LayerStore, i: int, finished: Finished, on_finished: OnFinished) -> None:
    if i == len(store):
        store.append(finished)
    on_finished(i, finished)


def _again(run: _Run, store: LayerStore, i: int, shape: LayerShape, w: Layer) -> Finished:
    """Take a layer from an earlier run: the hidden states pass through it."""
    known = ranks.alone(lambda: store.finished(i))
    about = ranks.same_object(None if known is None else dataclasses.replace(known, layer={}, blocks={}))
    assert about is not None
    layer = ranks.same({} if known is None else known.layer, run.device)
    run.pass_through(i, shape, w, about.shape, layer)
    return known or dataclasses.replace(about, layer=to_device(layer, torch.device("cpu")))


@dataclass(frozen=True)
class _Task:
    """What a pass over the layers is to do."""

    model: Model
    reduced_config: ModelConfig
    """The model's, but for the way in which heads are normed; its layers have the sizes from before."""
    method: Method
    quantization: Quantization
    mlp_stays: bool = False
    healing: BlockLimit | None = None
    seed: int = 0
    untouched: int = 0
    """Layers in front that stay as they are."""


class _Run:
    """The hidden states of one pass over the layers, and what is done to each."""

    def __init__(self, task: _Task, device: torch.device, room: Room) -> None:
        self.task, self.device, self.room = task, device, room
        # The last layer is trained twice.
        trainings = task.model.config.num_hidden_layers - task.untouched + 1
        self._healing = None if task.healing is None else Shares(task.healing, trainings)
        self._healing_notes: list[str] = []
        self._dtype = compute_dtype(device, task.model.config.hidden_size)

    def begin(self, tokens: Tensor, store: LayerStore) -> Layer:
        """Embed this process's share of `tokens`; the weights outside the layers, rounded if they are the input's."""
        model, config = self.task.model, self.task.model.config
        B, T = tokens.shape
        own = ranks.share(B)
        tokens, self._earlier = tokens[own], own.start
        self.batches = Batches(config, T, self.device)
        top = dict(model.top)
        reference = self._stream(config, model, tokens)
        rounding = self.task.quantization
        self._outside = LayerRounding(rounding.top, rounding.nearest, str(model.source.path))
        if "embed" in rounding.top and not config.tie_word_embeddings:
            # Tokens pick rows of it; all columns count the same.
            identity = torch.eye(config.hidden_size, device=self.device)
            self._round_top(top, "embed", lambda: identity, store)
        self._streams = None
        self._reference, self._fitted = reference, len(tokens)
        if self.task.method.fitted:
            reduced = self._stream(self.task.reduced_config, dataclasses.replace(model, top=top), tokens)
            widest = config.num_attention_heads * config.widest.v_head_dim
            outputs, attended = (self.room.empty(len(tokens), T, n) for n in (config.hidden_size, widest))
            self._streams = Streams(reference, reduced, self.batches, self._dtype, own.start, outputs, attended)
            if self._healing is not None:
                self._entry = self.room.empty(len(tokens), T, config.hidden_size)
                fitted = ranks.share(-(-FITTED_TOKENS // T))
                self._fitted = min(self._fitted, fitted.stop - fitted.start)
        return top

    def notes(self) -> list[str]:
        """What the user should know about how it went."""
        return [*self.batches.notes, *self._healing_notes]

    def _stream(self, config: ModelConfig, model: Model, tokens: Tensor) -> Stream:
        shape = *tokens.shape, config.hidden_size
        x = self.room.empty(*shape)
        for start in range(0, len(tokens), _EMBEDDED):
            x[start : start + _EMBEDDED] = embed(model, tokens[start : start + _EMBEDDED])
        entry = self.room.empty(*shape) if config.parallel_residual else None
        return Stream(config, x, self.device, entry)

    def layer(self, i: int, shape: LayerShape, target: Dimensions, w: Layer) -> Finished:
        """Layer `i` of weights `w` reduced to `target` and rounded; the hidden states move on through it."""
        task, where = self.task, f"{self.task.model.source.path}: layer {i}"
        rounding = LayerRounding(task.quantization.layers[i], task.quantization.nearest, where)
        try:
            if self._streams is None:
                new, new_shape, loss = reduce_plainly(
                    w, shape, target, self._reference, self.batches, self._earlier, task.method, where
                )
            elif i < task.untouched:
                fitted, rest = self._streams.split(self._fitted)
                new, new_shape, loss = scaled(w, shape, fitted, where, task.mlp_stays), shape, LayerLosses()
                self._pass_rest(rest.reference, shape, w)
                rest.reduced.x.copy_(rest.reference.x)
            else:
                if self._healing is not None:
                    self._entry.copy_(self._streams.reduced.x)
                fitted, rest = self._streams.split(self._fitted)
                new, new_shape, loss = reduce_fitted(w, shape, target, fitted, task.method, rounding, task.mlp_stays)
                if self._healing is not None:
                    # The reduced stream follows when the layer is trained.
                    self._pass_rest(rest.reference, shape, w)
                    new, loss = self._healed(i, new_shape, new, loss, self._streams, self._healing)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # exported at run time
            raise InputError(f"{where}: {error}; more or other calibration text may help") from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"{where}: out of memory on {self.device}: its moments and solvers do not fit; free some memory or use "
                "--device cpu"
            ) from error
        plain = {role: weight for role, weight in new.items() if role not in rounding.blocks}
        return Finished(to_device(plain, torch.device("cpu")), new_shape, loss, rounding.blocks, rounding.losses)

    def _pass_rest(self, rest: Stream, shape: LayerShape, w: Layer) -> None:
        """Move on through the original what the layer was not fitted to; mostly that is nothing."""
        if len(rest.x):
            pass_on(rest, self.batches, shape, lowered(w, self._dtype))

    def _healed(
        self,
        i: int,
        new_shape: LayerShape,
        new: Layer,
        losses: LayerLosses,
        streams: Streams,
        shares: Shares,
    ) -> tuple[Layer, LayerLosses]:
        """The reduced layer trained to put out what the original does; the reduced stream is put behind it.

        The last layer then learns to predict what the original does.
        """
        seed = self.task.seed + i
        entry, wanted, reduced = self._entry, streams.reference.x, streams.reduced

        def train(new: Layer, distance: Distance) -> tuple[Layer, BlockLoss]:
            with shares.next() as limit:
                args = reduced.config, new_shape, new, entry, wanted, limit, self.device, streams.dtype, seed
                healed, loss, notes = heal_block(*args, attention_only=self.task.mlp_stays, distance=distance)
            self._healing_notes = notes or self._healing_notes
            return healed, loss

        new, loss = train(new, relative_distance)
        losses = dataclasses.replace(losses, before_healing=loss.before, after_healing=loss.after)
        if i == self.task.model.config.num_hidden_layers - 1:
            new, loss = train(new, PredictionDistance(self.task.model, self.device, streams.dtype))
            losses = dataclasses.replace(losses, before_predictions=loss.before, after_predictions=loss.after)
        reduced.x.copy_(entry)
        pass_on(reduced, streams.batches, new_shape, lowered(new, streams.dtype))
        return new, losses

    def pass_through(self, i: int, shape: LayerShape, w: Layer, new_shape: LayerShape, new: Layer) -> None:
        """Move the hidden states on through layer `i`, which was reduced before."""
        if self._healing is not None and i >= self.task.untouched:
            self._healing.pass_over()
        low = lowered(w, self._dtype)
        if self._streams is None:
            pass_on(self._reference, self.batches, shape, low)
            return
        for part in self._streams.split(self._fitted):
            pass_on(part.reference, self.batches, shape, low)
        if i < self.task.untouched:
            self._streams.reduced.x.copy_(self._streams.reference.x)
            return
        pass_on(self._streams.reduced, self.batches, new_shape, lowered(new, self._dtype))

    def finish(self, top: Layer, store: LayerStore) -> dict[str, Blocks]:
        """Round the output weight for the states that reach it; tied, it is the embedding as well."""
        role = "embed" if self.task.model.config.tie_word_embeddings else "output"
        if self._streams is not None and role in self.task.quantization.top:
            self._round_top(top, role, partial(self._output_moments, self._streams.reduced, top), store)
        return self._outside.blocks

    def _output_moments(self, stream: Stream, top: Layer) -> Tensor:
        config, device = self.task.model.config, self.device
        inputs = InputMoments(config.hidden_size, device)
        last = to_device({name: weight for name, weight in top.items() if name.startswith("final_norm")}, device)

        def see(part: slice) -> None:
            inputs.add(norm(config, last, "final_norm", stream.part(part)).to(self._dtype))

        self.batches.each(len(stream.x), see)
        return inputs.gram()

    def _round_top(self, top: Layer, role: str, gram: Callable[[], Tensor], store: LayerStore) -> None:
        """Round a weight outside the layers in place, or take it from an earlier run."""
        known = store.top(role)
        if ranks.same_object(known is not None):
            known = Blocks.of(
                ranks.same_object(None if known is None else known.grid) or self.task.quantization.top[role],
                ranks.same({} if known is None else known.tensors(), torch.device("cpu")),
            )
            self._outside.blocks[role], top[role] = known, known.dequantize()
            return
        home = top[role].device
        top[role] = top[role].to(self.device, torch.float32)
        self._outside.apply(top, (role,), gram())
        top[role] = top[role].to(home)
        if ranks.first():
            store.keep_top(role, self._outside.blocks[role])


_EMBEDDED = 8
"""Sequences that are embedded at once."""
