"""A trained or converted model in Python: `load_model`, for notebooks and scripts."""

import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5x_lite import saved_run
from t5x_lite.decoding import METHOD_OF, METHODS, NO_BEAM, DecodeConfig
from t5x_lite.errors import UsageError, nearest
from t5x_lite.infer_inputs import encode as spell
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import Partitioning, make_partitioning
from t5x_lite.predict import Predictor
from t5x_lite.saved_run import SavedRun
from tasks import vocabularies

# Rows of a batch: few sizes, so that few programs are compiled, and one text does not wait for 32.
_BATCH_SIZES = (1, 8, 32)
_DECODE_FIELDS = [field.name for field in dataclasses.fields(DecodeConfig)]
_ARGUMENTS = [*_DECODE_FIELDS, "max_length", "seed", "return_scores"]
# What `generate` of transformers calls it.
_OUR_NAMES = {
    "max_new_tokens": "max_length=N",
    "do_sample": "method='sample'",
    "num_return_sequences": "num_outputs=N",
}


def load_model(
    model_dir: epath.PathLike,
    checkpoint: str | int = "latest",
    mesh: Mapping[str, int] | None = None,
) -> "LoadedModel":
    """Reads a model from MODEL_DIR, which `train` or `convert` has written.

    Args:
      model_dir: the directory, local or of an object store.
      checkpoint: "latest", "best" (of a run with BEST_METRIC), or a step.
      mesh: devices along each axis, {"fsdp": 4, "model": 2}; None: all devices along "data".

    Raises:
      UsageError: there is no such model or checkpoint, or the mesh does not fit.
      CheckpointError: the checkpoint is damaged.
      TypeError: `model_dir` is not a path.
    """
    if not isinstance(model_dir, str | os.PathLike):
        raise TypeError(f"model_dir is {type(model_dir).__name__}; give a directory's path")
    which = _check_checkpoint(checkpoint)
    _check_mesh(mesh)
    run = saved_run.read(os.path.expanduser(model_dir))
    [step] = saved_run.checkpoint_steps(run, which)
    partitioning = make_partitioning(mesh)
    return LoadedModel(run, step, saved_run.load_params(run, step, partitioning), partitioning)


def _check_checkpoint(checkpoint: object) -> str:
    """`checkpoint` as `saved_run.checkpoint_steps` takes it."""
    if isinstance(checkpoint, str | int | np.integer) and not isinstance(checkpoint, bool):
        which = str(checkpoint)
        if which in ("latest", "best") or which.isdecimal():
            return which
    raise UsageError(f"checkpoint = {checkpoint!r}: give 'latest', 'best' or a step")


def _check_mesh(mesh: object) -> None:
    if mesh is None:
        return
    if not isinstance(mesh, Mapping) or not all(
        isinstance(n, int) and n >= 1 for n in mesh.values()
    ):
        raise UsageError(
            f"mesh = {mesh!r}: give devices along each axis, such as {{'fsdp': 4, 'model': 2}}"
        )


class LoadedModel:
    """A model with its parameters and its vocabulary; from `load_model`.

    >>> model = load_model("runs/python_docs_finetune")
    >>> model.generate(["kind: Return the sum of two numbers."])
    ['function']
    >>> model.score(["kind: Return the sum of two numbers."] * 2, ["function", "class"])
    array([-0.01, -4.61], dtype=float32)

    Each combination of a few batch sizes and lengths is compiled when it first occurs, which takes
    seconds, and kept for the life of the process. The results do not depend on it.

    Attributes:
      params: nested dict of float32 arrays, layers stacked on the first axis; see `models.t5`.
        Others of the same names and shapes may be set.
      config: the architecture.
      vocabulary: a `seqio.Vocabulary`.
      step: of the checkpoint.
      model_dir: where it was read from.
      input_length: tokens of an input at most, the end mark included; a longer one is cut, with a
        warning. As in training; may be set.
      target_length: the same of a target.
    """

    # Any other name that is set is a mistyped one.
    __slots__ = (
        *("_params", "_partitioning", "config", "input_length"),
        *("model_dir", "step", "target_length"),
        "vocabulary",
    )

    def __init__(self, run: SavedRun, step: int, params: t5.Params, partitioning: Partitioning):
        self._params = params
        self.config: T5Config = run.model
        self.vocabulary = run.vocabulary
        self.step = step
        self.model_dir = os.fspath(run.model_dir)
        self.input_length = run.feature_lengths["inputs"]
        self.target_length = run.feature_lengths["targets"]
        self._partitioning = partitioning

    def __repr__(self) -> str:
        config = self.config
        return (
            f"LoadedModel(T5, {config.num_encoder_layers} + {config.num_decoder_layers} layers, "
            f"d_model {config.d_model}, {self.num_parameters:,} parameters; "
            f"step {self.step:,} of {self.model_dir!r})"
        )

    @property
    def params(self) -> t5.Params:
        return self._params

    @params.setter
    def params(self, params: t5.Params) -> None:
        """Raises UsageError if names, shapes or dtypes are not this model's."""
        found, expected = _describe(params), _describe(self._params)
        for name in [*expected, *found]:
            one, other = found.get(name, "missing"), expected.get(name, "unknown")
            if one != other:
                wanted = f"this model's is {other}" if name in expected else "not of this model"
                raise UsageError(f"params: {name} is {one}, {wanted}")
        self._params = params

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters together."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    def generate(
        self,
        texts: Iterable[str],
        *,
        method: str = "greedy",
        max_length: int | None = None,
        num_outputs: int = 1,
        seed: int = 0,
        return_scores: bool = False,
        **how: Any,
    ) -> list[Any] | tuple[list[Any], np.ndarray]:
        """Lets the model answer each text.

        Args:
          texts: the inputs, with the prefix that the model was trained with, if any.
          method: "greedy", "beam" or "sample".
          max_length: tokens of an output at most, the end mark included; None: `target_length`.
          num_outputs: answers to each text; "greedy" has 1, "beam" as many as there are beams.
          seed: for sampling; from 0 to 2^32 - 1. Text i draws from (seed, i) alone.
          return_scores: return the scores as well.
          **how: further fields of `decoding.DecodeConfig`: num_beams, length_penalty, beam_rules;
            temperature, top_k, top_p.

        Returns:
          A list with an answer for each text; with num_outputs > 1 a list of answers, best first.
          With return_scores a pair: these, and float32 [len(texts)] or [len(texts), num_outputs],
          the log probability of each answer in nats, end mark included, of a beam search with its
          length penalty. Where fewer beams have ended than were asked for, "" and -inf.

        Raises:
          UsageError: a value that decoding cannot follow, or a field of another method.
          TypeError: `texts` are not strings, or an unknown argument.
        """
        for name in how:
            if name in _OUR_NAMES:
                raise TypeError(f"no argument {name!r}; here it is {_OUR_NAMES[name]}")
            if name not in _DECODE_FIELDS:
                raise TypeError(f"no argument {name!r}; {nearest(name, _ARGUMENTS)}")
            if method in METHODS and method != METHOD_OF[name]:
                raise UsageError(
                    f"{name} has no effect on {method} decoding: add method={METHOD_OF[name]!r}"
                )
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed = {seed}: must be from 0 to 2^32 - 1")
        decode = DecodeConfig(method=method, num_outputs=num_outputs, **how)
        inputs = self._ids("input", texts, self.input_length)
        predictor = self._predictor(len(inputs), max_length)
        found = predictor.generate(self.params, inputs, decode, seed=seed)
        answers = [[self.detokenize(ids) for ids in prediction.ids] for prediction in found]
        scores = np.array([p.scores for p in found], np.float32).reshape(-1, num_outputs)
        scores[scores == NO_BEAM] = -np.inf
        if num_outputs == 1:
            best = [first for [first] in answers]
            return (best, scores[:, 0]) if return_scores else best
        return (answers, scores) if return_scores else answers

    def score(self, inputs: Iterable[str], targets: Iterable[str]) -> np.ndarray:
        """How likely the model finds each target after its input.

        Returns:
          float32 [len(inputs)]: the log likelihood in nats, summed over the target's tokens, the
          end mark included.

        Raises:
          ValueError: there are not as many targets as inputs.
          TypeError: they are not strings.
        """
        input_ids = self._ids("input", inputs, self.input_length)
        target_ids = self._ids("target", targets, self.target_length)
        return self._predictor(len(input_ids)).score(self.params, input_ids, target_ids)

    def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The encoder's output for each text.

        Returns:
          float32 [tokens, d_model] for each text, a row for each id of `tokenize(text)`; after the
          encoder's final norm.

        Raises:
          TypeError: `texts` are not strings.
        """
        inputs = self._ids("input", texts, self.input_length)
        return self._predictor(len(inputs)).encode(self.params, inputs)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with the end mark; of any length."""
        if not isinstance(text, str):
            raise TypeError(f"tokenize takes one text, a string, not {type(text).__name__}")
        [(ids, _)] = spell(self.vocabulary, _strings("text", [text]), sys.maxsize)
        return ids.tolist()

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids up to an end mark, sentinels as `<extra_id_0>`."""
        return vocabularies.decode_with_sentinels(self.vocabulary, ids)

    def _predictor(self, num_rows: int, max_length: int | None = None) -> Predictor:
        target_length = self.target_length if max_length is None else max_length
        if target_length < 1:
            raise UsageError(f"max_length = {target_length}: must be at least 1")
        wanted = next((n for n in _BATCH_SIZES if n >= num_rows), _BATCH_SIZES[-1])
        shards = self._partitioning.num_batch_shards
        return Predictor(
            self.config,
            self._partitioning,
            batch_size=math.ceil(wanted / shards) * shards,
            input_length=self.input_length,
            target_length=target_length,
        )

    def _ids(self, what: str, texts: Iterable[str], length: int) -> list[np.ndarray]:
        """Ids of each text with the end mark, at most `length`."""
        found = spell(self.vocabulary, _strings(what, texts), length)
        num_cut = sum(is_cut for _, is_cut in found)
        if num_cut:
            warnings.warn(
                f"{num_cut} of {len(found)} {what}s cut to {length} tokens; "
                f"set model.{what}_length to allow more",
                stacklevel=3,
            )
        return [ids for ids, _ in found]


def _strings(what: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{what}s must be a list of texts, not one: give [{texts[:20]!r}]")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what} {i} is {type(text).__name__}, not a string")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UsageError(f"{what} {i} has half of a surrogate pair")
    return texts


def _describe(params: Any) -> dict[str, str]:
    """Shape and dtype of each array, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{jnp.result_type(x)}{list(np.shape(x))}"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
