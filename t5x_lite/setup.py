"""What a run needs before its first step: programs compiled while the data is being opened."""

import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_lite import optimizers, partitioning, step
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.predict import Predictor
from t5x_lite.run_config import TrainConfig, eval_name

if TYPE_CHECKING:
    from t5x_lite import data, task_evaluation

# What TensorFlow's and CUDA's libraries say of themselves while they load, at any log level.
_NATIVE_NOTE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|I0000 00:00:|E0000 00:00:.* cuInit"
)


class Input(NamedTuple):
    """The opened data.

    Attributes:
      provider: the seqio task or mixture.
      train: this host's rows, endlessly.
      evaluation: this host's rows of the validation split.
      eval_tasks: the examples of each task that has metrics.
      text_ids_V: bool, the ids that are text.
    """

    provider: Any
    train: "data.TrainBatches"
    evaluation: "data.EvalBatches"
    eval_tasks: "list[task_evaluation.EvalTask]"
    text_ids_V: np.ndarray


class Programs(NamedTuple):
    """The compiled steps and where their arrays lie.

    Attributes:
      mesh: the devices.
      init: key -> state.
      train_step: (state, batch, key) -> (state, scalars); the state is donated.
      eval_step: (params, batch, text_ids) -> sums.
      abstract_state: shapes, dtypes and shardings of the state.
      state_axes: the logical axes of each of its arrays.
    """

    mesh: Mesh
    init: Callable[..., step.TrainState]
    train_step: Callable[..., tuple[step.TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., dict[str, jax.Array]]
    abstract_state: step.TrainState
    state_axes: step.TrainState


def open_input(config: TrainConfig) -> Input:
    """Opens the data; raises UsageError for whatever is wrong with it."""
    with without_native_notes():
        from t5x_lite import data, task_evaluation  # seconds of TensorFlow

    data.configure(config.data)
    provider = data.check(config.data, config.model.vocab_size)
    host, num_hosts = jax.process_index(), jax.process_count()
    train = data.train_batches(config.data, provider, config.random_seed, host, num_hosts)
    evaluation = data.EvalBatches(config.data, provider, config.eval_steps, host, num_hosts)
    if next(iter(evaluation), None) is None:
        raise UsageError(
            f"{provider.name}: the split {config.data.eval_split!r} gives no row of "
            f"{dict(config.data.task_feature_lengths)} to evaluate on"
        )
    how = config.evaluation
    eval_tasks = task_evaluation.open_tasks(
        config.data, provider, config.data.eval_split, how.num_examples, how.mode
    )
    if config.best_metric is not None:
        task_evaluation.check_metric(config.best_metric, eval_tasks, eval_name(config))
    return Input(
        provider,
        train,
        evaluation,
        eval_tasks,
        data.text_ids(provider, config.model.vocab_size),
    )


def make_mesh(config: TrainConfig) -> Mesh:
    """The mesh over all devices.

    Raises:
      UsageError: the devices do not make the mesh, or the batch does not divide over it.
    """
    mesh = partitioning.make_mesh(config.mesh)
    config.check_batch_divides(mesh.shape["data"])
    if mesh.shape["data"] % jax.process_count():
        raise UsageError(
            f"the mesh's axis 'data' has {mesh.shape['data']} parts for {jax.process_count()} "
            "processes, each of which reads its own rows: give it a multiple of these"
        )
    return mesh


def make_programs(config: TrainConfig, *, compile_train_step: bool = True) -> Programs:
    """Derives every sharding from the logical axes and builds the jitted functions.

    Raises:
      UsageError: a parameter or the batch does not divide over the mesh.
    """
    config.evaluation.decode.check(config.model.vocab_size)
    mesh = make_mesh(config)
    num_data_shards = mesh.shape["data"]
    axes = t5.logical_axes(config.model)
    optimizer = optimizers.make_optimizer(config.optimizer, axes)
    init = functools.partial(step.init_state, config.model, optimizer)
    shapes = jax.eval_shape(init, jax.random.key(0))
    opt_axes = optimizers.optimizer_state_axes(shapes.opt_state, axes)
    scalar: Any = ()
    state_axes = step.TrainState(scalar, axes, opt_axes)
    partitioning.check_divisible(shapes, state_axes, mesh)
    shardings = partitioning.shardings(mesh, state_axes)
    abstract_state = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    everywhere = partitioning.replicated(mesh)
    rows = partitioning.batch_sharding(mesh)
    train_step: Any = jax.jit(
        functools.partial(
            step.train_step,
            config.model,
            config.loss,
            optimizer,
            optimizers.make_schedule(config.optimizer),
            num_data_shards,
        ),
        in_shardings=(shardings, rows, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    eval_step = jax.jit(
        functools.partial(step.eval_step, config.model, num_data_shards),
        in_shardings=(shardings.params, rows, everywhere),
        out_shardings=everywhere,
    )
    if compile_train_step:
        key = jax.eval_shape(lambda: jax.random.key(0))
        train_step = train_step.lower(abstract_state, _batch_shapes(config), key).compile()
    return Programs(
        mesh,
        jax.jit(init, out_shardings=shardings),
        train_step,
        eval_step,
        abstract_state,
        state_axes,
    )


def make_predictor(config: TrainConfig, mesh: Mesh) -> Predictor:
    """Decodes for evaluations, in batches of EVAL_BATCH_SIZE or more, a multiple of the devices."""
    rows, devices = config.evaluation.batch_size or config.data.batch_size, mesh.shape["data"]
    lengths = config.data.task_feature_lengths
    return Predictor(
        config.model,
        mesh,
        batch_size=-(-rows // devices) * devices,
        input_length=lengths["inputs"],
        target_length=lengths["targets"],
    )


@contextmanager
def opening_input(config: TrainConfig) -> Iterator[Future[Input]]:
    """Opens the data in a thread while the caller compiles: both take seconds."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(open_input, config)


@contextmanager
def without_native_notes() -> Iterator[None]:
    """Keeps what native libraries say of themselves while they load off stderr.

    Whatever else is written there meanwhile appears at the end.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not _NATIVE_NOTE.match(line):
                    os.write(2, line)


def _batch_shapes(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What `data` will deliver, known before it is opened."""
    names = {
        "inputs": ["encoder_input_tokens"],
        "targets": ["decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights"],
    }
    if config.data.pack:
        names["inputs"] += ["encoder_segment_ids", "encoder_positions"]
        names["targets"] += ["decoder_segment_ids", "decoder_positions"]
    lengths = config.data.task_feature_lengths
    for feature in names:
        if feature not in lengths:
            raise UsageError(
                f"TASK_FEATURE_LENGTHS = {dict(lengths)!r} has no length for {feature!r}; an "
                "encoder-decoder needs inputs and targets"
            )
    return {
        name: jax.ShapeDtypeStruct((config.data.batch_size, lengths[feature]), jnp.int32)
        for feature, group in names.items()
        for name in group
    }
