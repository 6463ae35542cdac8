"""Every patch of lm_eval and every private name of it that this project uses.

    hook.py         patches lm_eval as it is imported: model registry, task index, early reading
    tasks.py        our tasks as entries of lm_eval's index, from the YAML in tasks/
    index_cache.py  lm_eval's own index, kept between commands
    saving.py       patches the tracker that saves results
    hflm.py         the subclass of HFLM that loads another way

`NEEDS` lists the names that may move with a release. tests/test_lm_eval_compat.py checks each one.
"""

from __future__ import annotations

from typing import NamedTuple


class Need(NamedTuple):
    """A name of lm_eval that we rely on."""

    module: str
    name: str
    parameters: tuple[str, ...]
    """Of the function, as we call it or as our replacement takes them."""
    reason: str


_HFLM = "lm_eval.models.huggingface"

NEEDS = (
    Need(
        *("lm_eval.api.registry", "model_registry.register", ("aliases", "target")),
        "releases without plugin discovery learn of --model qlora_adapter here",
    ),
    Need(
        *("lm_eval.tasks._index", "TaskIndex.build", ("paths",)),
        "patched: returns our tasks as well, and lm_eval's own from a cache",
    ),
    Need(
        *("lm_eval.tasks._index", "Entry", ("name", "kind", "yaml_path", "cfg", "tags")),
        "one for each of our tasks and groups, without a YAML file for each",
    ),
    Need("lm_eval.tasks._index", "Kind.TASK", (), "the kind of such an entry"),
    Need("lm_eval.tasks._index", "Kind.GROUP", (), "the kind of such an entry"),
    Need(
        *("lm_eval.tasks._yaml_loader", "load_yaml", ("path",)),
        "reads our YAML with its !function tags",
    ),
    Need(
        *("lm_eval.config.evaluate_config", "EvaluatorConfig.process_tasks", ("metadata",)),
        "patched: reads the MMLU files before the model is loaded",
    ),
    Need(
        *("lm_eval.config.evaluate_config", "EvaluatorConfig", ("tasks", "metadata")),
        "says which MMLU files those are",
    ),
    Need(
        *("lm_eval.loggers", "EvaluationTracker.save_results_aggregated", ()),
        "patched: lm_eval swallows errors while it saves, and exits with 0",
    ),
    Need(
        *("lm_eval.loggers", "EvaluationTracker.save_results_samples", ("task_name", "samples")),
        "patched: as above",
    ),
    Need(
        *(_HFLM, "HFLM._create_model", ("pretrained",)),
        "overridden: it can't quantise under transformers 5, nor attach an adapter unmerged",
    ),
    Need(
        *(_HFLM, "HFLM._loglikelihood_tokens", ("requests", "disable_tqdm", "override_bs")),
        "overridden and called: scores token ids; here with a float32 output head",
    ),
    Need(
        *(_HFLM, "HFLM._encode_pair", ("context", "continuation")),
        "the benchmark times it apart from the scoring",
    ),
    Need(_HFLM, "HFLM.model", (), "overridden: public, but set through the private _model"),
    Need(_HFLM, "HFLM.rank", (), "overridden: HFLM counts local processes, and on GPUs only"),
    Need(_HFLM, "HFLM.world_size", (), "overridden: as above"),
)
