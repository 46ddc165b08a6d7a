"""The end of a run: baselines, a few predictions, the report, and where everything is."""

import json
from typing import Any

from etils import epath

from t5x_lite import baselines, best, data, evaluate, files, report, setup
from t5x_lite.distributed import is_coordinator, tell
from t5x_lite.integrity import scan
from t5x_lite.metrics import read_metrics
from t5x_lite.predict import Predictor
from t5x_lite.run_config import TrainConfig, eval_name
from t5x_lite.step import TrainState

# Enough examples for a unigram model; a pass over a small split.
_UNIGRAM_EXAMPLES = 20_000


def is_finished(model_dir: epath.Path, config: TrainConfig, step: int) -> bool:
    """True if the run ends at this step and `finish` has come to its end for it.

    A run can be killed before that.
    """
    if step < config.train_steps and not best.is_exhausted(model_dir, config):
        return False
    measured, report_page = model_dir / "metrics" / "baselines.json", model_dir / "report.html"
    if not measured.exists() or json.loads(measured.read_text()).get("step") != step:
        return False
    if config.num_sample_predictions and not list(
        (model_dir / "inference").glob(f"*-{step}.jsonl")
    ):
        return False
    return report_page.exists() and report_page.stat().mtime >= measured.stat().mtime


def finish(
    model_dir: epath.Path,
    config: TrainConfig,
    opened: setup.Input,
    state: TrainState,
    predictor: Predictor,
) -> None:
    """Writes baselines, predictions and the report, and prints what they say.

    Every process of a job calls it and takes part in the predictions; process 0 does the rest.

    Args:
      model_dir: where to.
      config: the run.
      opened: its data.
      state: its last state.
      predictor: decodes.
    """
    lines = []
    if not opened.eval_tasks and config.num_sample_predictions:
        lines = _sample_predictions(config, opened, state, predictor)
    if is_coordinator():
        _write(model_dir, config, opened, int(state.step), lines)


def _write(
    model_dir: epath.Path,
    config: TrainConfig,
    opened: setup.Input,
    step: int,
    predictions: list[dict[str, str]],
) -> None:
    counts = data.token_counts(
        config.data, opened.provider, config.model.vocab_size, _UNIGRAM_EXAMPLES
    )
    # All rows of each batch, where `opened.evaluation` has this process's.
    batches = data.EvalBatches(config.data, opened.provider, config.eval_steps)
    unigram_loss = evaluate.unigram_loss(counts, batches, opened.text_ids_V)
    found = {task.series: baselines.measure(config.data, task) for task in opened.eval_tasks}
    if predictions:
        name = config.data.mixture_or_task_name
        files.write_atomically(
            model_dir / "inference" / f"{name}-{step}.jsonl",
            "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions).encode(),
        )
    content: dict[str, Any] = {"step": step, "unigram_loss": unigram_loss}
    content["tasks"] = {series: b._asdict() for series, b in found.items() if b is not None}
    text = json.dumps(content) + "\n"
    files.write_atomically(model_dir / "metrics" / "baselines.json", text.encode())
    report.write_report(model_dir)  # last: `is_finished` looks for it
    _print_outcome(model_dir, config, step, content)


def _print_outcome(
    model_dir: epath.Path, config: TrainConfig, step: int, measured: dict[str, Any]
) -> None:
    saved_steps = scan(model_dir / "checkpoints").steps
    stopped = "" if step >= config.train_steps else ", stopped early"
    print(f"\nthe run is complete: step {step} of {config.train_steps}{stopped}")
    for path in sorted((model_dir / "inference").glob(f"*-{step}.jsonl")):
        for line in path.read_text().splitlines()[: config.num_sample_predictions]:
            prediction = json.loads(line)
            print()
            for field in ("inputs", "targets", "prediction"):
                print(f"  {field:10}  {str(prediction.get(field, ''))[:300]}")
    split = eval_name(config)
    loss = read_metrics(model_dir / "metrics" / f"{split}.jsonl")[-1]["text_loss"]
    print(
        f"\n{split} loss over text tokens {loss:.3f} nats; a unigram model of the same tokens "
        f"{measured['unigram_loss']:.3f}"
    )
    for series, baseline in measured["tasks"].items():
        last = read_metrics(model_dir / "metrics" / f"{series}.jsonl")[-1]
        for metric, value in baseline["metrics"].items():
            print(f"{series} {metric} {last[metric]:.1f}; {baseline['name']} {value:.1f}")
    kept = best.find(model_dir, config, saved_steps)
    if kept is not None:
        print(f"best {config.best_metric} {kept.value:.4g}, at step {kept.step}, which is kept")
    tell_places(model_dir)


def tell_places(model_dir: epath.Path) -> None:
    """Where to look."""
    for name in ("checkpoints", "metrics", "tensorboard", "inference", "report.html"):
        tell(f"  {name:12} {model_dir / name}")


def _sample_predictions(
    config: TrainConfig, opened: setup.Input, state: TrainState, predictor: Predictor
) -> list[dict[str, str]]:
    examples = data.eval_examples(config.data, opened.provider, config.num_sample_predictions)
    predicted = predictor.generate(state.params, [example["inputs"] for example in examples])
    vocabulary = data.target_vocabulary(opened.provider)
    return [
        {
            "inputs": data.decode(vocabulary, example["inputs"]),
            "targets": data.decode(vocabulary, example["targets"]),
            "prediction": data.decode(vocabulary, prediction.ids[0]),
        }
        for example, prediction in zip(examples, predicted, strict=True)
    ]
