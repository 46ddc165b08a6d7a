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

from t5x_lite import optimizers, step
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.partitioning import InputShare, Partitioning, make_partitioning
from t5x_lite.predict import Predictor
from t5x_lite.run_config import TrainConfig, eval_name

if TYPE_CHECKING:
    from t5x_lite import data, indexed_data, task_evaluation

# What TensorFlow's and CUDA's libraries say of themselves while they load, at any log level.
_NATIVE_NOTE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|I0000 00:00:|E0000 00:00:.* cuInit"
)


class Input(NamedTuple):
    """The opened data.

    Attributes:
      provider: the seqio task or mixture.
      train: this process's rows, endlessly.
      evaluation: this process's rows of the validation split.
      eval_tasks: the examples of each task that has metrics.
      text_ids_V: bool, the ids that are text.
    """

    provider: Any
    train: "data.TrainBatches | indexed_data.IndexedBatches"
    evaluation: "data.EvalBatches"
    eval_tasks: "list[task_evaluation.EvalTask]"
    text_ids_V: np.ndarray


class Programs(NamedTuple):
    """The compiled steps and where their arrays lie.

    Attributes:
      partitioning: the devices, and what lies where on them.
      init: key -> state.
      train_step: (state, batch, key) -> (state, scalars); the state is donated.
      eval_step: (params, batch, text_ids) -> sums.
      abstract_state: shapes, dtypes and shardings of the state.
      state_axes: the logical axes of each of its arrays.
    """

    partitioning: Partitioning
    init: Callable[..., step.TrainState]
    train_step: Callable[..., tuple[step.TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., dict[str, jax.Array]]
    abstract_state: step.TrainState
    state_axes: step.TrainState


def open_input(config: TrainConfig, share: InputShare) -> Input:
    """Opens the data, of which this process reads its share.

    Raises:
      UsageError: whatever is wrong with it.
    """
    with without_native_notes():
        from t5x_lite import data, task_evaluation  # seconds of TensorFlow

    data.configure(config.data)
    provider = data.check(config.data, config.model.vocab_size)
    train = _open_training_rows(config, provider, share)
    evaluation = data.EvalBatches(config.data, provider, config.eval_steps, share)
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


def _open_training_rows(
    config: TrainConfig, provider: Any, share: InputShare
) -> "data.TrainBatches | indexed_data.IndexedBatches":
    from t5x_lite import cache, data, indexed_data

    seed = config.random_seed
    if config.data.cache_dir is None:
        return data.train_batches(config.data, provider, seed, share)
    directory, manifest = cache.open_for_run(config.data, provider)
    return indexed_data.IndexedBatches(directory, manifest, config.data.batch_size, seed, share)


def partitioning_of(config: TrainConfig, devices: list | None = None) -> Partitioning:
    """The run's mesh over `devices`, all that there are by default, and its table.

    Raises:
      UsageError: the devices do not make the mesh, or the batch does not divide over it.
    """
    partitioning = make_partitioning(
        config.mesh,
        over_slices=config.dcn_mesh,
        rules=config.sharding_rules,
        devices=devices,
    )
    config.check_batch_divides(partitioning.num_batch_shards)
    partitioning.input_share(partitioning.mesh.devices.flat[0].process_index)
    return partitioning


def make_programs(
    config: TrainConfig,
    partitioning: Partitioning | None = None,
    *,
    compile_train_step: bool = True,
) -> Programs:
    """Derives every sharding from the logical axes and builds the jitted functions.

    Args:
      config: the run.
      partitioning: where it runs, devices that are not there included; the run's by default.
      compile_train_step: compile it now, for the shapes that `data` will deliver.

    Raises:
      UsageError: a parameter, an activation or the batch does not divide over the mesh.
    """
    config.evaluation.decode.check(config.model.vocab_size)
    if partitioning is None:
        partitioning = partitioning_of(config)
    axes = t5.logical_axes(config.model)
    optimizer = optimizers.make_optimizer(config.optimizer, axes)
    init = functools.partial(step.init_state, config.model, optimizer)
    shapes = jax.eval_shape(init, jax.random.key(0))
    opt_axes = optimizers.optimizer_state_axes(shapes.opt_state, axes)
    scalar: Any = ()
    state_axes = step.TrainState(scalar, axes, opt_axes)
    partitioning.check_divisible(shapes, state_axes)
    check_activations(config, partitioning)
    shardings = partitioning.shardings(state_axes)
    abstract_state = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    rows, everywhere = partitioning.batch, partitioning.replicated
    train_step: Any = jax.jit(
        functools.partial(
            step.train_step,
            config.model,
            config.loss,
            optimizer,
            optimizers.make_schedule(config.optimizer),
            partitioning,
        ),
        in_shardings=(shardings, rows, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    eval_step = jax.jit(
        functools.partial(step.eval_step, config.model, partitioning),
        in_shardings=(shardings.params, rows, everywhere),
        out_shardings=everywhere,
    )
    if compile_train_step:
        key = jax.eval_shape(lambda: jax.random.key(0))
        train_step = train_step.lower(abstract_state, batch_shapes(config), key).compile()
    return Programs(
        partitioning,
        jax.jit(init, out_shardings=shardings),
        train_step,
        eval_step,
        abstract_state,
        state_axes,
    )


def check_activations(config: TrainConfig, partitioning: Partitioning) -> None:
    """Raises UsageError if what the model lays out cannot be split evenly."""
    model = config.model
    sizes = {
        "activation_embed": model.d_model,
        "activation_heads": model.num_heads,
        "activation_mlp": model.d_ff,
        "activation_vocab": model.vocab_size,
    }
    for feature, length in config.data.task_feature_lengths.items():
        for name, size in sizes.items():
            shape = jax.ShapeDtypeStruct((config.data.batch_size, length, size), jnp.int32)
            partitioning.check_divisible({feature: shape}, {feature: ("batch", "length", name)})


def make_predictor(config: TrainConfig, partitioning: Partitioning) -> Predictor:
    """Decodes for evaluations, in batches of EVAL_BATCH_SIZE or more, a multiple of the devices."""
    rows, shards = (
        config.evaluation.batch_size or config.data.batch_size,
        partitioning.num_batch_shards,
    )
    lengths = config.data.task_feature_lengths
    return Predictor(
        config.model,
        partitioning,
        batch_size=-(-rows // shards) * shards,
        input_length=lengths["inputs"],
        target_length=lengths["targets"],
    )


@contextmanager
def opening_input(config: TrainConfig, share: InputShare) -> Iterator[Future[Input]]:
    """Opens the data in a thread while the caller compiles: both take seconds."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(open_input, config, share)


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


def batch_shapes(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
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
