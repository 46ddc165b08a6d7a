"""Looks for the mesh, the microbatches and the remat policy that fit a target and are fastest.

Every combination is first judged in closed form, which takes no time and is right to a few tens of
per cent; the most promising are compiled, and what the compiled programs say decides.

How far the closed form is off, of the 21 programs in docs/plan.md: they need 0.5 to 1.0 times the
memory that it expects, move 0.7 to 1.5 times the bytes from and to memory, and send 0.6 to 0.9
times the bytes. So it chooses what to compile, and is never an answer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from t5x_lite import optimizers, setup, step
from t5x_lite.errors import UsageError, nearest
from t5x_lite.losses import CHUNK_BYTES
from t5x_lite.models import t5
from t5x_lite.models.config import REMAT_POLICIES
from t5x_lite.partitioning import MESH_AXES, Partitioning, make_rules
from t5x_lite.plan.chips import Chip, num_links
from t5x_lite.plan.cost import Fit, Plan, fit
from t5x_lite.plan.flops import model_flops
from t5x_lite.plan.program import DoesNotFit
from t5x_lite.plan.targets import Target
from t5x_lite.run_config import TrainConfig

# Arrays of at most this size are thought to stay on the chip between instructions: half of the 128
# MiB that it has there (Austin et al. 2025, part 2). In programs for v5p hardly any do.
ON_CHIP_BYTES = 64 * 2**20
LANES = 128  # of which a TPU's arrays have a multiple in their last dimension


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay a run out, and what it is thought to need.

    Attributes:
      mesh: devices along each mesh axis.
      num_microbatches: LossConfig.num_microbatches.
      remat_policy: T5Config.remat_policy.
      memory_bytes: on a device, estimated.
      seconds: the bound on a step, estimated.
      all_seconds: the sum of the terms of which that is the largest.
    """

    mesh: dict[str, int]
    num_microbatches: int
    remat_policy: str
    memory_bytes: float
    seconds: float
    all_seconds: float

    def is_next_to(self, other: "Candidate") -> bool:
        """Whether they differ in one thing by one step: a factor of the microbatches, the policy,
        or devices of one axis that lie along another."""
        changed = [axis for axis in self.mesh if self.mesh[axis] != other.mesh[axis]]
        counts = sorted((self.num_microbatches, other.num_microbatches))
        same_count, same_policy = counts[0] == counts[1], self.remat_policy == other.remat_policy
        if not changed and same_policy:
            return counts[1] % counts[0] == 0 and _is_prime(counts[1] // counts[0])
        if not changed:
            return same_count
        moved = sorted(
            max(self.mesh[a], other.mesh[a]) // min(self.mesh[a], other.mesh[a]) for a in changed
        )
        return len(changed) == 2 and _is_prime(moved[0]) and same_count and same_policy

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The run, laid out like this."""
        return dataclasses.replace(
            config,
            mesh=self.mesh,
            loss=dataclasses.replace(config.loss, num_microbatches=self.num_microbatches),
            model=dataclasses.replace(config.model, remat_policy=self.remat_policy),
        )


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was compiled.

    Attributes:
      candidate: which.
      plan: what its program needs; None if there is none.
      fit: whether it has room; None if it was refused before that was known.
      refusal: why there is no program.
    """

    candidate: Candidate
    plan: Plan | None
    fit: Fit | None
    refusal: str | None = None

    @property
    def fits(self) -> bool:
        """It could be compiled and has room."""
        return self.fit is not None and self.fit.fits


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
      tried: what was compiled, the best first: what fits, by the bound on a step to three digits
        and then by the sum of its terms; what does not, by the memory it needs.
      num_candidates: combinations that divide.
      num_too_large: of them, those that were not expected to fit.
      refused: meshes that do not divide, and why not.
    """

    tried: tuple[Tried, ...]
    num_candidates: int
    num_too_large: int
    refused: tuple[tuple[dict[str, int], str], ...]

    @property
    def best(self) -> Tried | None:
        """The fastest that fits."""
        return next((t for t in self.tried if t.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; of each program that was tried its plan, without its collectives."""
        tried = []
        for t in self.tried:
            entry: dict[str, Any] = dataclasses.asdict(t.candidate)
            entry |= {"fits": t.fits, "fit": t.fit and dataclasses.asdict(t.fit)}
            entry |= {"bound": t.plan and t.plan.to_dict()["bound"], "refusal": t.refusal}
            tried.append(entry)
        return {
            "tried": tried,
            "num_candidates": self.num_candidates,
            "num_too_large": self.num_too_large,
            "refused": [{"mesh": mesh, "reason": reason} for mesh, reason in self.refused],
        }


def search(
    config: TrainConfig,
    target: Target,
    chip: Chip,
    plan: Callable[[TrainConfig], Plan],
    max_compiles: int,
    report: Callable[[Candidate], None] = lambda candidate: None,
) -> Found:
    """Climbs from the layout that is expected to be fastest to better ones among its neighbours.

    Where none of the best one's neighbours is left, it goes on with what is expected to be fastest
    of the others. What turns out not to fit corrects what is expected of the memory of those with
    the same policy. As long as nothing fits, it goes on even if nothing is expected to, with what
    is expected to be smallest.

    Args:
      config: the run; its own mesh, microbatches and remat policy do not matter.
      target: where.
      chip: its figures.
      plan: compiles a run and says what it needs; UsageError and DoesNotFit refuse it.
      max_compiles: calls of `plan`, at most.
      report: told of each candidate before it is compiled.

    Raises:
      UsageError: no mesh divides the run.
    """
    candidates, refused = enumerate_candidates(config, target, chip)
    if not candidates:
        mesh, reason = refused[0]
        raise UsageError(f"no mesh of {target.name} divides this run; {mesh}: {reason}")
    usable = chip.usable_bytes / target.devices_per_chip
    num_too_large = sum(c.memory_bytes > usable for c in candidates)
    left = sorted(candidates, key=_order)
    tried: list[Tried] = []
    correction = dict.fromkeys(REMAT_POLICIES, 1.0)

    def expected(candidate: Candidate) -> float:
        return candidate.memory_bytes * correction[candidate.remat_policy]

    while left and len(tried) < max_compiles:
        small = [c for c in left if expected(c) <= usable]
        best = min(tried, key=_merit) if any(t.fits for t in tried) else None
        near = [c for c in small if best is not None and best.candidate.is_next_to(c)]
        if not small and best is not None:
            break
        smallest = min(left, key=lambda c: (expected(c), _order(c)))
        candidate = next(iter(near or small), smallest)
        left.remove(candidate)
        report(candidate)
        tried.append(_try(candidate, config, target, chip, plan))
        fit_of_it = tried[-1].fit
        if fit_of_it is not None and not fit_of_it.fits:
            needed = fit_of_it.needed_bytes / candidate.memory_bytes
            policy = candidate.remat_policy
            correction[policy] = max(correction[policy], needed)
    return Found(tuple(sorted(tried, key=_merit)), len(candidates), num_too_large, refused)


def _try(
    candidate: Candidate,
    config: TrainConfig,
    target: Target,
    chip: Chip,
    plan: Callable[[TrainConfig], Plan],
) -> Tried:
    run = candidate.apply(config)
    try:
        result = plan(run)
    except DoesNotFit as e:
        too_large = fit(e.memory, run, target, chip, refused=e)
        return Tried(candidate, None, too_large, str(e))
    except UsageError as e:
        return Tried(candidate, None, None, str(e))
    return Tried(candidate, result, result.fit)


def _order(candidate: Candidate) -> tuple:
    """Sorts by what is expected; complete, so that every run of a search is the same."""
    c = candidate
    # Many have the same bound; of them the one that has least to do meanwhile.
    layout = (str(c.mesh), c.remat_policy, c.num_microbatches)
    return (_digits(c.seconds), c.all_seconds, c.memory_bytes, *layout)


def _merit(tried: Tried) -> tuple:
    """Sorts by what came out."""
    order = _order(tried.candidate)
    if tried.fit is None:
        return (2, *order)
    if tried.plan is None or not tried.fits:
        return (1, tried.fit.needed_bytes, *order)
    bound = tried.plan.bound
    return (0, _digits(bound.seconds), sum(dataclasses.astuple(bound)), *order)


def _digits(x: float) -> float:
    return float(f"{x:.3g}")


# ---- the candidates ------------------------------------------------------------------------------


def enumerate_candidates(
    config: TrainConfig, target: Target, chip: Chip
) -> tuple[list[Candidate], tuple[tuple[dict[str, int], str], ...]]:
    """All layouts that divide, with estimates; and the meshes that do not, with the reason.

    The microbatches of a mesh and policy ascend.

    Raises:
      UsageError: SHARDING_RULES or DCN_MESH are wrong whatever the mesh.
    """
    make_rules(config.sharding_rules or {})  # what is wrong with them is no mesh's fault
    across = config.dcn_mesh
    if across is not None and math.prod(across.values()) != target.num_slices:
        raise UsageError(
            f"DCN_MESH = {dict(across)} is {math.prod(across.values())} slices, but {target.name} "
            f"has {target.num_slices}"
        )
    for axis in across or {}:
        if axis not in MESH_AXES:
            raise UsageError(f"DCN_MESH has no axis {axis!r}; {nearest(axis, MESH_AXES)}")
    state = _State.of(config)
    candidates: list[Candidate] = []
    refused = []
    for mesh in meshes(target.num_devices):
        try:
            partitioning = _partitioning(config, mesh)
            _check(config, target, partitioning, state)
        except UsageError as e:
            refused.append((mesh, str(e)))
            continue
        estimator = _Estimator(config, target, chip, partitioning, state)
        rows = config.data.batch_size // partitioning.num_batch_shards
        for policy in REMAT_POLICIES:
            for count in (n for n in range(1, rows + 1) if rows % n == 0):
                candidates.append(estimator.candidate(mesh, count, policy))
    return candidates, tuple(refused)


def meshes(num_devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay devices out along data, fsdp and model."""
    for model in _divisors(num_devices):
        for fsdp in _divisors(num_devices // model):
            sizes = (num_devices // model // fsdp, fsdp, model)
            yield dict(zip(MESH_AXES, sizes, strict=True))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _partitioning(config: TrainConfig, mesh: dict[str, int]) -> Partitioning:
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    return Partitioning(abstract, make_rules(config.sharding_rules or {}))


@dataclasses.dataclass(frozen=True)
class _State:
    """Shapes and logical axes of the train state."""

    shapes: step.TrainState
    axes: step.TrainState

    @classmethod
    def of(cls, config: TrainConfig) -> "_State":
        axes = t5.logical_axes(config.model)
        optimizer = optimizers.make_optimizer(config.optimizer, axes)
        init = functools.partial(step.init_state, config.model, optimizer)
        shapes = jax.eval_shape(init, jax.random.key(0))
        scalar: Any = ()
        opt_axes = optimizers.optimizer_state_axes(shapes.opt_state, axes)
        return cls(shapes, step.TrainState(scalar, axes, opt_axes))


def _check(config: TrainConfig, target: Target, partitioning: Partitioning, state: _State) -> None:
    """Raises UsageError if something does not divide over the mesh."""
    mesh = partitioning.mesh.shape
    if config.dcn_mesh is None and (mesh["data"] * mesh["fsdp"]) % target.num_slices:
        raise UsageError(f"data x fsdp is no multiple of {target.num_slices} slices")
    for axis, count in (config.dcn_mesh or {}).items():
        if mesh[axis] % count:
            raise UsageError(f"DCN_MESH: {axis} {mesh[axis]} is no multiple of {count} slices")
    if config.data.batch_size % partitioning.num_batch_shards:
        raise UsageError(
            f"BATCH_SIZE = {config.data.batch_size} does not divide over "
            f"{partitioning.num_batch_shards} devices"
        )
    partitioning.check_divisible(state.shapes, state.axes)
    setup.check_activations(config, partitioning)


# ---- estimates -----------------------------------------------------------------------------------


class _Estimator:
    """Closed forms for one mesh. All sizes are bytes on one device."""

    def __init__(
        self,
        config: TrainConfig,
        target: Target,
        chip: Chip,
        partitioning: Partitioning,
        state: _State,
    ):
        self.model, self.data = config.model, config.data
        self.mesh = dict(partitioning.mesh.shape)
        self.item = jnp.dtype(self.model.dtype).itemsize
        self.params = _bytes_per_device(partitioning, state.shapes.params, state.axes.params)
        self.optimizer = _bytes_per_device(
            partitioning, state.shapes.opt_state, state.axes.opt_state
        )
        self.rows = self.data.batch_size // partitioning.num_batch_shards
        devices = target.devices_per_chip
        self.flops_per_second = chip.peak_flops.value / devices
        self.hbm_bandwidth = chip.hbm_bandwidth.value / devices
        self.link_bandwidth = chip.link_bandwidth.value * num_links(target.topology) / devices
        self.dcn_bandwidth = chip.dcn_bandwidth.value / devices
        self.kind, self.num_slices, self.is_gpu = target.kind, target.num_slices, target.is_gpu
        lengths = self.data.task_feature_lengths
        self.lengths = lengths["inputs"], lengths["targets"]
        flops = model_flops(self.model, self.data.batch_size, *self.lengths)
        self.forward_flops = flops / 3 / target.num_devices

    def candidate(self, mesh: dict[str, int], count: int, policy: str) -> Candidate:
        """What the run needs with `count` microbatches and a remat policy."""
        passes = {"none": 3.0, "dots": 3.2, "full": 4.0}[policy]
        links, dcn = self._communication(count, policy)
        seconds = (
            passes * self.forward_flops / self.flops_per_second,
            self._traffic(count, policy) / self.hbm_bandwidth,
            links / self.link_bandwidth,
            dcn / self.dcn_bandwidth,
        )
        memory = self.params + self.optimizer + self._temporaries(count, policy)
        return Candidate(mesh, count, policy, memory, max(seconds), sum(seconds))

    def _elements(self, rows: float, policy: str) -> tuple[float, float]:
        """What all layers leave for the backward pass of `rows`, and one layer's attention scores.

        The scores are part of the former only with the policy "none".
        """
        m, model = self.model, self.mesh["model"]
        inputs, targets = (rows * length for length in self.lengths)
        heads = rows * m.num_heads / model
        scores_encoder = heads * self.lengths[0] ** 2
        scores_decoder = heads * self.lengths[1] * sum(self.lengths)
        width = m.num_heads * m.d_kv / model
        mlp = len(m.mlp_activations) * m.d_ff / model

        def kept(positions: float, attentions: int, scores: float) -> float:
            residual = positions * m.d_model
            if policy == "full":
                return residual
            if policy == "dots":
                products = positions * (attentions * (3 * width + m.d_model) + mlp + m.d_model)
                return residual + products
            # As found in compiled programs: of each sub-layer's input two arrays in float32 and two
            # in the model's dtype, of scores one in each, of an MLP all that its gelu computes.
            sublayers = attentions + 1
            return (
                6 * sublayers * residual
                + positions * (4 * attentions * width + 4 * mlp)
                + 3 * scores
            )

        encoder = m.num_encoder_layers * kept(inputs, 1, scores_encoder)
        decoder = m.num_decoder_layers * kept(targets, 2, scores_decoder)
        return encoder + decoder, max(scores_encoder, scores_decoder)

    def _temporaries(self, count: int, policy: str) -> float:
        """Gradients, what is kept for the backward pass, and what one layer works with."""
        m, model = self.model, self.mesh["model"]
        rows = self.rows / count
        # One float32 gradient; a second one where microbatches add up.
        gradients = self.params * (1 if count == 1 else 2)
        kept, scores = self._elements(rows, policy)
        mlp = len(m.mlp_activations) * m.d_ff / model
        working = 12 * scores + self.item * rows * self.lengths[0] * (4 * m.d_model + 3 * mlp)
        logits = 3 * min(CHUNK_BYTES, 4 * rows * self.lengths[1] * m.vocab_size) / model
        matrices = 8 * m.num_heads * m.d_kv + (len(m.mlp_activations) + 1) * m.d_ff
        gathered = 2 * self.item * m.d_model * matrices / model
        return gradients + self.item * kept + working + logits + gathered

    def _traffic(self, count: int, policy: str) -> float:
        """From and to memory in a step: weights, gradients, state, activations."""
        state = 2 * (self.params + self.optimizer)
        if self.is_gpu:
            return state
        m = self.model
        passes = 4 if policy == "full" else 3
        weights = count * passes * self.params * self.mesh["fsdp"] * self.item / 4
        accumulated = 3 * self.params * (count if count > 1 else 0)
        kept, scores = self._elements(self.rows / count, policy)
        working, _ = self._elements(self.rows / count, "none")
        is_near = self.kind != "v5p" and 4 * scores <= ON_CHIP_BYTES
        layers = count * self.item * (2 * kept + passes * working * (0.25 if is_near else 1))
        logits = 5 * 4 * self.rows * self.lengths[1] * m.vocab_size / self.mesh["model"]
        # A device looks up its columns of the embeddings of all rows of its fsdp group.
        columns = LANES * math.ceil(m.d_model / self.mesh["fsdp"] / LANES)
        tokens = self.rows * self.mesh["fsdp"] * sum(self.lengths)
        looked_up = 6 * self.item * tokens * columns
        return weights + accumulated + 2 * state + layers + logits + looked_up

    def _communication(self, count: int, policy: str) -> tuple[float, float]:
        """Bytes that a device sends in a step: to neighbours, to other slices."""
        m = self.model
        data, fsdp, model = (self.mesh[axis] for axis in MESH_AXES)
        whole = self.params * fsdp  # a model shard's parameters, float32
        ring = (fsdp - 1) / fsdp
        gathers = 3 if policy == "full" else 2
        share = whole * ring * (gathers * self.item / 4 + 1)
        links = count * share
        if data > 1:
            links += count * 2 * self.params * (data - 1) / data
        dcn = 0.0
        if self.num_slices > 1:
            across = (self.num_slices - 1) / self.num_slices
            dcn = count * 2 * self.params * across
        if model > 1:
            reduces = 3 if policy == "full" else 2  # of each sub-layer's output, forward and back
            sublayers = 2 * self.lengths[0] * m.num_encoder_layers
            sublayers += 3 * self.lengths[1] * m.num_decoder_layers
            size = self.item * self.rows * m.d_model
            links += reduces * sublayers * size * 2 * (model - 1) / model
        return links, dcn


def _bytes_per_device(partitioning: Partitioning, shapes: Any, axes_tree: Any) -> int:
    shardings = partitioning.shardings(axes_tree)
    sizes = jax.tree.map(
        lambda s, sharding: math.prod(sharding.shard_shape(s.shape)) * s.dtype.itemsize,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
