"""How often a mixture draws from each of its tasks, and T5's mixtures.

Rates are proportional to the sizes of the tasks, up to a limit, and may be evened out by a
temperature: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv:1910.10683), section 3.5.2. The sizes are a table, as in T5: nothing is read to register.
"""

import dataclasses

import seqio

from t5x_lite.errors import UsageError

# Examples of the train split. 0: no such split, the task is there to be evaluated.
GLUE_SIZES = {
    "glue_cola_v002": 8_551,
    "glue_sst2_v002": 67_349,
    "glue_mrpc_v002": 3_668,
    "glue_qqp_v002": 363_849,
    "glue_stsb_v002": 5_749,
    "glue_mnli_v002": 392_702,
    "glue_qnli_v002": 104_743,
    "glue_rte_v002": 2_490,
    "glue_mnli_matched_v002": 0,
    "glue_mnli_mismatched_v002": 0,
    "glue_ax_v002": 0,
}
SUPER_GLUE_SIZES = {
    "dpr_v001_simple": 1_322,
    "super_glue_wsc_v102_simple_train": 259,  # those with the right candidate
    "super_glue_wsc_v102_simple_eval": 0,
    "super_glue_boolq_v102": 9_427,
    "super_glue_cb_v102": 250,
    "super_glue_copa_v102": 400,
    "super_glue_multirc_v102": 27_243,
    "super_glue_record_v102": 138_854,
    "super_glue_rte_v102": 2_490,
    "super_glue_wic_v102": 5_428,
    "super_glue_axb_v102": 0,
    "super_glue_axg_v102": 0,
}
C4 = "c4_v020_unsupervised"
OTHER_SIZES = {
    C4: 364_868_892,
    "cnn_dailymail_v002": 287_113,
    "squad_v010_allanswers": 87_599,
    "wmt_t2t_ende_v003": 4_592_289,
    "wmt15_enfr_v003": 40_853_298,
    "wmt16_enro_v003": 610_320,
}
SIZES = GLUE_SIZES | SUPER_GLUE_SIZES | OTHER_SIZES


@dataclasses.dataclass(frozen=True)
class Proportional:
    """The rate of a task: min(size * scale, maximum) ** (1 / temperature).

    Attributes:
      maximum: T5's limit K on the size of any task; None is none.
      temperature: 1 keeps the proportions, a higher one evens them out. mT5's exponent alpha
        (arXiv:2010.11934, section 3.2: 0.3) is a temperature of 1 / alpha.
      scale: what the size is multiplied with before the limit.

    Raises:
      UsageError: one of them is not above 0.
    """

    maximum: float | None = None
    temperature: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self)

    def __call__(self, task: seqio.Task) -> float:
        """`task`'s size is that of `SIZES`, else that of its cache or its source's train split."""
        if task.name in SIZES:
            size: float = SIZES[task.name]
        else:
            size = seqio.mixing_rate_num_examples(task)
        rate = size * self.scale
        if self.maximum is not None:
            rate = min(rate, self.maximum)
        return rate ** (1 / self.temperature)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What T5 leaves to gin about the multi-task mixtures.

    Attributes:
      maximum: as `Proportional.maximum`. T5 pre-trained its multi-task models with 1e6 (section
        3.7), and compared 2**16 to 2**21.
      temperature: as `Proportional.temperature`; for the supervised tasks, and for C4 where its
        rate is by size.
      unsupervised: the rate of C4 in `all_mix`, as T5's default; T5's models had 0.71e6 (small) to
        133e6 (11B).

    Raises:
      UsageError: one of them is not above 0.
    """

    maximum: float | None = 1e6
    temperature: float = 1.0
    unsupervised: float = 1e6

    def __post_init__(self) -> None:
        _check_positive(self)


def _check_positive(rates: Proportional | Rates) -> None:
    for name, value in dataclasses.asdict(rates).items():
        if value is not None and value <= 0:
            raise UsageError(f"mixing rates: {name} = {value!r} must be above 0")


_rates = Rates()


def set_rates(rates: Rates) -> None:
    """Sets the rates of `all_mix` and `all_proportional`, which ask for them when they are read."""
    global _rates
    _rates = rates


def _unsupervised(task: seqio.Task) -> float:
    return _rates.unsupervised


def _by_size(task: seqio.Task) -> float:
    return Proportional(_rates.maximum, _rates.temperature)(task)


def _half_by_size(task: seqio.Task) -> float:
    return Proportional(_rates.maximum, _rates.temperature, scale=0.5)(task)


def register() -> None:
    """Registers T5's mixtures.

    `glue_v002_proportional`, `super_glue_v102_proportional`: by size, without limit. Without
      GLUE's wnli, whose place DPR and WSC take in SuperGLUE's, as in T5.
    `glue_mnli_and_dev_v002`: mnli and its two development sets, equal rates.
    `all_mix`: C4 at `Rates.unsupervised`, and by size GLUE, SuperGLUE, CNN/DailyMail, SQuAD and
      WMT. RTE is in GLUE and in SuperGLUE, half each.
    `all_proportional`: the same tasks, C4 too by size.
    """
    seqio.MixtureRegistry.add("glue_v002_proportional", list(GLUE_SIZES.items()))
    seqio.MixtureRegistry.add("super_glue_v102_proportional", list(SUPER_GLUE_SIZES.items()))
    mnli = [name for name in GLUE_SIZES if "mnli" in name]
    seqio.MixtureRegistry.add("glue_mnli_and_dev_v002", mnli, default_rate=1.0)
    supervised = [
        (name, _half_by_size if "_rte_" in name else _by_size) for name in SIZES if name != C4
    ]
    seqio.MixtureRegistry.add("all_mix", [(C4, _unsupervised), *supervised])
    seqio.MixtureRegistry.add("all_proportional", [(C4, _by_size), *supervised])
