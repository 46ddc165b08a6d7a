"""The end of a run: the baseline, a few predictions, the report, and where everything is."""

import json

from etils import epath

from t5x_lite import data, evaluate, files, report, setup
from t5x_lite.metrics import read_metrics
from t5x_lite.run_config import TrainConfig, eval_name
from t5x_lite.step import TrainState

# Enough examples for a unigram model; a pass over a small split.
_UNIGRAM_EXAMPLES = 20_000


def is_finished(model_dir: epath.Path, config: TrainConfig, step: int) -> bool:
    """True if `finish` has come to its end for this step; a run can be killed before that."""
    baselines, report_page = model_dir / "metrics" / "baselines.json", model_dir / "report.html"
    if not baselines.exists() or json.loads(baselines.read_text()).get("step") != step:
        return False
    if config.num_sample_predictions and not _inference_path(model_dir, config, step).exists():
        return False
    return report_page.exists() and report_page.stat().mtime >= baselines.stat().mtime


def _inference_path(model_dir: epath.Path, config: TrainConfig, step: int) -> epath.Path:
    return model_dir / "inference" / f"{config.data.mixture_or_task_name}-{step}.jsonl"


def finish(
    model_dir: epath.Path, config: TrainConfig, opened: setup.Input, state: TrainState
) -> None:
    """Writes the unigram baseline, predictions and the report, and prints what they say.

    Args:
      model_dir: where to.
      config: the run.
      opened: its data.
      state: its last state.
    """
    counts = data.token_counts(
        config.data, opened.provider, config.model.vocab_size, _UNIGRAM_EXAMPLES
    )
    baseline = evaluate.unigram_loss(counts, opened.evaluation, opened.text_ids_V)
    predictions = _sample_predictions(config, opened, state)
    if predictions:
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
        files.write_atomically(_inference_path(model_dir, config, int(state.step)), lines.encode())
    text = json.dumps({"step": int(state.step), "unigram_loss": baseline}) + "\n"
    files.write_atomically(model_dir / "metrics" / "baselines.json", text.encode())
    report.write_report(model_dir)  # last: `is_finished` looks for it

    print(f"\nthe run is complete: step {int(state.step)} of {config.train_steps}")
    for prediction in predictions:
        print()
        for field in ("inputs", "targets", "prediction"):
            print(f"  {field:10}  {prediction[field][:300]}")
    split = eval_name(config)
    found = read_metrics(model_dir / "metrics" / f"{split}.jsonl")[-1]["text_loss"]
    print(
        f"\n{split} loss over text tokens {found:.3f} nats; a unigram model of the same tokens "
        f"{baseline:.3f}"
    )
    print_places(model_dir)


def print_places(model_dir: epath.Path) -> None:
    """Where to look."""
    for name in ("checkpoints", "metrics", "tensorboard", "inference", "report.html"):
        print(f"  {name:12} {model_dir / name}")


def _sample_predictions(
    config: TrainConfig, opened: setup.Input, state: TrainState
) -> list[dict[str, str]]:
    count = config.num_sample_predictions
    examples = data.eval_examples(config.data, opened.provider, count) if count else []
    if not examples:
        return []
    lengths = config.data.task_feature_lengths
    inputs = [example["inputs"] for example in examples]
    predicted = evaluate.predict(
        config.model, state.params, inputs, lengths["inputs"], lengths["targets"]
    )
    vocabulary = data.target_vocabulary(opened.provider)
    return [
        {
            "inputs": data.decode(vocabulary, example["inputs"]),
            "targets": data.decode(vocabulary, example["targets"]),
            "prediction": data.decode(vocabulary, ids),
        }
        for example, ids in zip(examples, predicted, strict=True)
    ]
