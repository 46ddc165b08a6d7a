"""C4 (English) from TFDS, in the versions that people have prepared, under T5's task names."""

from tasks import registration, sources, vocabularies

# TFDS can generate 3.1.0 only (with Apache Beam: about 7 TB of Common Crawl); the older ones are
# read where someone keeps a prepared copy.
VERSIONS = ("2.2.0", "2.2.1", "2.3.0", "2.3.1", "3.0.1", "3.1.0")

_PREPARE = {
    "3.0.1": (
        "copy it: gsutil -u YOUR_PROJECT -m cp -r "
        "gs://allennlp-tensorflow-datasets/c4/en/3.0.1 {data_dir}/c4/en/"
    ),
    "3.1.0": "prepare it: tfds build c4/en:3.1.0 --data_dir={data_dir}",
}


def _how_to_prepare(version: str) -> str:
    copy = (
        f"TFDS no longer generates this version, copy it: cp -r OTHER_DATA_DIR/c4/en/{version} "
        "{data_dir}/c4/en/"
    )
    return _PREPARE.get(version, copy)


def register() -> None:
    """Registers `c4_v220_span_corruption` and its siblings, and `c4_v020_unsupervised`.

    The latter is what T5's multi-task mixtures call C4, whose objective T5 leaves to gin: here span
    corruption over the newest version, or what TFDS_VERSIONS says.
    """
    for version in VERSIONS:
        source = sources.PreparedTfdsSource(
            f"c4/en:{version}", ["train", "validation"], _how_to_prepare
        )
        name = "c4_v" + version.replace(".", "")
        registration.register_objectives(name, source, vocabularies.DEFAULT)
    source = sources.PreparedTfdsSource("c4/en", ["train", "validation"], _how_to_prepare)
    registration.register_objective(
        "c4_v020_unsupervised", source, vocabularies.DEFAULT, "span_corruption"
    )
