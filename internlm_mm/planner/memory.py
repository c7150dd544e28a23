"""What fills a rank's memory, by kind, and the moment of a step at which it is fullest.

Every formula follows what the code does, and stands beside its reason. What is counted are bytes
of tensors, as an allocator would if it lost nothing; not the CUDA context, nor what kernels and
communication libraries take for themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from internlm_mm.planner.activations import (
    in_flight,
    input_bytes,
    kept_bytes,
    layer_bytes,
    logits_bytes,
    loss_bytes,
    recomputed,
    recomputed_bytes,
)
from internlm_mm.planner.sizes import (
    ModelSizes,
    ParameterShape,
    RunSizes,
    StateSize,
    layer_parameters,
    outer_parameters,
)

KINDS = (
    'parameters',
    'optimizer',
    'gradients',
    'gathered_parameters',
    'gathered_gradients',
    'activations',
    'logits',
    'buffers',
)
"""What memory is used for.

parameters, optimizer, gradients: this rank's shards, gradients as they are at the update.
gathered_parameters, gathered_gradients: whole ones, besides the shards, while layers compute.
activations: what layers keep for backward, and what a layer's backward works with.
logits: a chunk's scores and the head's gradient, which the loss computes in forward.
buffers: flat copies for communication, what pipeline stages send each other, batches.
"""


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """A rank's memory, in bytes.

    Attributes:
        kinds: The most of each kind over a step, wherever it is; they are not full all at once.
        moments: Moment of a step -> kind -> bytes on the device.
        host: In host memory, where the optimizer is offloaded.
    """

    kinds: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: int

    @property
    def peak_moment(self) -> str:
        """When the device is fullest."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """The most on the device at any moment."""
        return sum(self.moments[self.peak_moment].values())


@dataclass(slots=True)
class _Unit:
    """What FSDP2 gathers and reduces at once: a layer, or what is outside the layers."""

    parameters: list[ParameterShape]
    whole: int = 0  # numbers in whole gradients
    gathered: int = 0  # bytes of whole parameters, as layers compute with them
    shard: int = 0
    frozen: int = 0  # bytes of what has no gradient, as it is held

    def count(self, run: RunSizes) -> '_Unit':
        trained = [one for one in self.parameters if one.trained]
        self.whole = sum(one.unsharded(run.tensor) for one in trained)
        self.gathered = sum(
            one.unsharded(run.tensor) * (1 if one.name in run.in_8_bits else run.param_bytes)
            for one in (trained if run.frozen_whole else self.parameters)
        )
        self.shard = sum(one.sharded(run.tensor, run.shards) for one in trained)
        self.frozen = sum(_frozen_bytes(run, one) for one in self.parameters if not one.trained)
        return self


@dataclass(slots=True)
class _Part:
    """What a rank holds, counted."""

    outer: _Unit
    layers: list[_Unit]
    again: list[bool]  # whether the layer is recomputed
    numbers: list[int]  # of the layers, in the model
    whole: int = field(init=False)
    shard: int = field(init=False)
    frozen: int = field(init=False)

    def __post_init__(self) -> None:
        units = [self.outer, *self.layers]
        self.whole = sum(unit.whole for unit in units)
        self.shard = sum(unit.shard for unit in units)
        self.frozen = sum(unit.frozen for unit in units)


def rank_parameters(sizes: ModelSizes, run: RunSizes, pipeline_rank: int) -> list[ParameterShape]:
    """Every parameter that a rank of the pipeline axis holds a part of."""
    outer, layers = _parameters(sizes, run, pipeline_rank)
    return [*outer, *(one for layer in layers for one in layer)]


def predict_memory(sizes: ModelSizes, run: RunSizes, pipeline_rank: int = 0) -> MemoryPrediction:
    """Reckon a rank's memory through a step.

    Args:
        sizes: Of the model.
        run: Of the run.
        pipeline_rank: The rank's place on the pipeline axis. Otherwise the rank is the first of its
            shard group, which holds the largest shards.
    """
    outer, layers = _parameters(sizes, run, pipeline_rank)
    again = [
        number < recomputed(run, len(run.stages[stage]))
        for stage in sorted(run.stages_of_rank[pipeline_rank])
        for number in range(len(run.stages[stage]))
    ]
    numbers = [
        layer for stage in sorted(run.stages_of_rank[pipeline_rank]) for layer in run.stages[stage]
    ]
    units = [_Unit(one).count(run) for one in layers]
    part = _Part(_Unit(outer).count(run), units, again, numbers)
    master = run.master_bytes
    resident = {
        'parameters': part.shard * master + part.frozen,
        'optimizer': sum(
            _state_bytes(run, one) for unit in (outer, *layers) for one in unit if one.trained
        ),
    }
    gradients = part.shard * master
    kinds = dict.fromkeys(KINDS, 0)
    moments: dict[str, dict[str, int]] = {}
    host = 0
    if run.offload:
        host = sum(resident.values()) + gradients
        resident = {}
    for moment, found in _step(sizes, run, pipeline_rank, part):
        found = {kind: resident.get(kind, 0) + found.get(kind, 0) for kind in KINDS}
        for kind in KINDS:
            kinds[kind] = max(kinds[kind], found[kind])
        if sum(found.values()) > sum(moments.get(moment, {}).values()):
            moments[moment] = found
    kinds['gradients'] = 0 if run.offload else gradients
    return MemoryPrediction(kinds, moments, host)


def _frozen_bytes(run: RunSizes, parameter: ParameterShape) -> int:
    # In the precision that they compute in: nothing is added to them that needs a wider one.
    if run.frozen_whole:
        numbers = parameter.unsharded(run.tensor)
    else:
        numbers = parameter.sharded(run.tensor, run.shards)
    return numbers // 2 + numbers // 16 if parameter.in_4_bits else numbers * run.param_bytes


def _state_bytes(run: RunSizes, parameter: ParameterShape) -> int:
    # A step count of four bytes for every tensor, besides the moments.
    usual = StateSize(run.moments * run.master_bytes, 4)
    state = run.states.get(parameter.name, usual)
    return int(state.each * parameter.sharded(run.tensor, run.shards)) + state.fixed


def _parameters(
    sizes: ModelSizes, run: RunSizes, pipeline_rank: int
) -> tuple[list[ParameterShape], list[list[ParameterShape]]]:
    stages = run.stages_of_rank[pipeline_rank]
    outer = outer_parameters(sizes, 0 in stages, len(run.stages) - 1 in stages)
    layers = [
        layer_parameters(sizes, layer) for stage in sorted(stages) for layer in run.stages[stage]
    ]
    return outer, layers


def _step(
    sizes: ModelSizes, run: RunSizes, pipeline_rank: int, part: _Part
) -> Iterator[tuple[str, dict[str, int]]]:
    """What is held at the moments of a step besides masters and optimizer state."""
    stages = run.stages_of_rank[pipeline_rank]
    has_loss = len(run.stages) - 1 in stages
    kept = sum(
        kept_bytes(sizes, run, run.stages[stage], stage == 0, stage == len(run.stages) - 1)
        for stage in stages
    )
    loss = loss_bytes(sizes, run) if has_loss else 0
    flying = in_flight(run, pipeline_rank)
    buffers = _batch_bytes(run) + _pipeline_bytes(sizes, run, pipeline_rank)
    for micro_batch in sorted({0, min(1, run.micro_batches - 1), run.micro_batches - 1}):
        # Of micro-batches on their way besides the one at hand; the last ones find nobody behind
        # them. The last stage's loss is computed with its forward, so what it keeps waits, too.
        more = max(min(flying, run.micro_batches - micro_batch) - 1, 0)
        others = {'activations': int(more * kept), 'logits': int(more * loss)}
        walk = _Walk(sizes, run, part, micro_batch, buffers, others)
        # With gpipe all losses come before the first backward.
        if has_loss and (micro_batch == 0 or run.schedule != 'gpipe' or flying == 1):
            yield from walk.loss(kept, loss)
        yield from walk.backward(kept, has_loss)
    shard = 0 if run.offload else part.shard
    yield (
        'optimizer step',
        {
            'gradients': shard * run.master_bytes,
            'optimizer': shard * run.master_bytes * run.optimizer_copies,
        },
    )


class _Walk:
    """One micro-batch, from the end of its forward to the end of its backward."""

    def __init__(
        self,
        sizes: ModelSizes,
        run: RunSizes,
        part: _Part,
        micro_batch: int,
        buffers: int,
        others: dict[str, int],
    ) -> None:
        self.sizes, self.run, self.part = sizes, run, part
        self.buffers, self.others = buffers, others
        self.is_first, self.is_last = micro_batch == 0, micro_batch == run.micro_batches - 1

    def loss(self, kept: int, loss: int) -> Iterator[tuple[str, dict[str, int]]]:
        """The head: after the last layer's forward, all activations of the micro-batch are there.

        In forward the hidden states live besides what is kept. In backward gradients are scaled
        into new tensors of the computing precision.
        """
        run, sizes = self.run, self.sizes
        hidden = run.tokens * sizes.hidden_size * run.param_bytes
        head = self._head()
        before = self._found(len(self.part.layers), 0, kept, at_loss=True)
        logits = logits_bytes(sizes, run)
        yield 'loss, forward', _plus(before, activations=hidden, logits=loss + logits)
        if sizes.compares_pairs and sizes.trains_head:
            # Logits are computed once more, and the head's gradient in fp32 or wider.
            head += logits + head // run.param_bytes * run.master_bytes
        yield 'loss, backward', _plus(before, activations=hidden, logits=loss + head)

    def _head(self) -> int:
        """The gradient of the head's weight, as it leaves the loss."""
        run, sizes = self.run, self.sizes
        if not sizes.trains_head:
            return 0
        return sizes.vocab_size // run.tensor * sizes.hidden_size * run.param_bytes

    def backward(self, kept: int, has_loss: bool) -> Iterator[tuple[str, dict[str, int]]]:
        """Layer by layer from the last; what is outside the layers is reduced at the end."""
        run, sizes, part = self.run, self.sizes, self.part
        p, reduce = run.param_bytes, run.reduce_bytes
        # The head's gradient waits for the end with what else is outside the layers; without FSDP2
        # it is added to the gradients at once.
        head = self._head() if has_loss else 0
        waiting = head if run.sharded else 0
        for index in reversed(range(len(part.layers))):
            again, number = part.again[index], part.numbers[index]
            full = layer_bytes(sizes, run, number)
            small = recomputed_bytes(sizes, run, number)
            work = (self._work() if full else 0) + (max(full - small, 0) if again else 0)
            found = self._found(index + 1, waiting, kept)
            whole = part.layers[index].whole
            found = _plus(found, activations=work)
            if run.sharded:
                # All gradients of a layer are there before they are summed or sent.
                found = _plus(found, gathered_gradients=whole * p)
                if self.is_last and index + 1 < len(part.layers):
                    # The flat copy that the layer before is reduced from, until this one is done.
                    found = _plus(found, buffers=part.layers[index + 1].whole * reduce)
            elif self.is_first:
                found = _plus(found, gradients=whole * run.master_bytes)
            kept -= small if again else full
            yield 'backward of a layer', found
            if run.sharded and self.is_last:
                yield 'reduction of a layer', self._reduction(index, waiting, kept)
        found = self._found(0, waiting, max(kept, 0))
        outer = part.outer.whole
        if run.sharded:
            # Of a tied table the look-up's gradient is there before it is added to the head's.
            table = head if sizes.tie_word_embeddings else 0
            found = _plus(found, gathered_gradients=part.outer.whole * p - waiting + table)
            if self.is_last:
                flat = outer + (part.layers[0].whole if part.layers else 0)
                found = _plus(found, buffers=flat * reduce)
        yield 'end of backward', found

    def _found(self, layers: int, waiting: int, kept: int, at_loss: bool = False) -> dict[str, int]:
        """When backward has `layers` layers before it, and the outer unit."""
        run, part = self.run, self.part
        ahead = sum(unit.whole for unit in part.layers[:layers]) + part.outer.whole
        behind = part.whole - ahead
        found = {
            'activations': kept + self.others['activations'],
            'logits': self.others['logits'],
            'buffers': self.buffers,
        }
        if not run.sharded:
            # Gradients are those of the step from the first backward on.
            gradients = behind if self.is_first else part.whole
            return found | {'gradients': gradients * run.master_bytes}
        found['gathered_parameters'] = self._gathered(layers, at_loss)
        gradients = waiting
        if run.micro_batches > 1:
            # Whole gradients wait for the step's last micro-batch, in the precision of reduction:
            # the first micro-batch leaves them behind, the last one takes them along.
            held = part.whole
            if self.is_first:
                held = behind
            elif self.is_last:
                held = ahead
            gradients += held * run.reduce_bytes
        found['gathered_gradients'] = gradients
        if self.is_last and not run.offload:
            reduced = sum(unit.shard for unit in part.layers[layers:])
            found['gradients'] = reduced * run.master_bytes
        if run.reshard == 'layer' and 0 < layers and not at_loss:
            # The flat result of the next layer's gather, before it is cut into parameters.
            found['buffers'] += part.layers[layers - 1].gathered
        return found

    def _gathered(self, layers: int, at_loss: bool) -> int:
        """Bytes of whole parameters."""
        run, part = self.run, self.part
        if run.reshard == 'layer':
            # The layer at hand, and the next, which is gathered ahead; none while the head works.
            near = [] if at_loss else part.layers[max(layers - 2, 0) : layers]
        elif self.is_last:
            near = part.layers[:layers]  # given up layer by layer in the last backward
        else:
            near = part.layers
        return part.outer.gathered + sum(unit.gathered for unit in near)

    def _reduction(self, index: int, waiting: int, kept: int) -> dict[str, int]:
        """When a layer's gradients are copied together, sent and received."""
        run, unit = self.run, self.part.layers[index]
        found = self._found(index, waiting, max(kept, 0))
        flat = unit.whole * run.reduce_bytes
        if run.shards == 1:
            # Nobody to share with: FSDP2 copies, and divides into one more copy.
            return _plus(found, buffers=2 * flat)
        source = run.reduce_bytes if run.micro_batches > 1 else run.param_bytes
        return _plus(found, buffers=flat, gathered_gradients=unit.whole * source)

    def _work(self) -> int:
        """What a layer's backward holds at its fullest besides what forward kept.

        That is in the feed-forward layer: the gradients of its two branches and of the residual,
        before and after.
        """
        run, sizes = self.run, self.sizes
        inner = 2 * sizes.intermediate_size // run.tensor
        work = run.tokens * (inner + 2 * sizes.hidden_size) * run.param_bytes
        if sizes.adapters is not None and sizes.adapters.four_bit:
            # The largest weight that is made anew for a product.
            work += sizes.intermediate_size * sizes.hidden_size * run.param_bytes
        return work


def _batch_bytes(run: RunSizes) -> int:
    """Ids, labels and positions of eight bytes and documents of four, of every micro-batch."""
    return 28 * run.tokens * run.micro_batches


def _pipeline_bytes(sizes: ModelSizes, run: RunSizes, pipeline_rank: int) -> int:
    """What pipeline stages receive from each other and send.

    torch makes room beforehand for what a stage receives in all micro-batches of a step. Schedules
    of several stages a rank also hold what they have sent until the step ends, which adds up over
    the micro-batches that are through.
    """
    stages = run.stages_of_rank[pipeline_rank]
    # With the stage before, and with the next; each way an activation or its gradient.
    neighbours = sum((stage > 0) + (stage < len(run.stages) - 1) for stage in stages)
    held = float(run.micro_batches)
    if len(stages) > 1:
        held += run.micro_batches - in_flight(run, pipeline_rank)
    return int(neighbours * held * input_bytes(sizes, run))


def _plus(found: dict[str, int], **more: int) -> dict[str, int]:
    return found | {kind: found.get(kind, 0) + size for kind, size in more.items()}
