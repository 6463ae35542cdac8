"""All our patches of lm_eval, and all its private names that we use.

    hook.py         patches lm_eval on import: model registry, task index, early reading of files
    tasks.py        adds our tasks from the YAML in tasks/ to lm_eval's index
    start_up.py     shortens two imports of a scoring command
    index_cache.py  caches lm_eval's own index between commands, and transformers'
    saving.py       patches the tracker that saves results
    hflm.py         the subclass of HFLM with our loading
    environment.py  describes the environment for lm_eval's results ahead of time

`NEEDS` lists the names that a release may move. tests/test_lm_eval_compat.py checks each.
"""

from __future__ import annotations

from typing import NamedTuple


class Need(NamedTuple):
    """A name of lm_eval that we rely on, with the parameters that we use."""

    module: str
    name: str
    parameters: tuple[str, ...]
    reason: str


_HFLM = "lm_eval.models.huggingface"

NEEDS = (
    Need("lm_eval.api.registry", "model_registry.register", ("aliases", "target"),
         "registers --model qlora_adapter in releases without plugin discovery"),
    Need("lm_eval.tasks._index", "TaskIndex.build", ("paths",),
         "patched: adds our tasks, and takes lm_eval's own from a cache"),
    Need("lm_eval.tasks._index", "Entry", ("name", "kind", "yaml_path", "cfg", "tags"),
         "one for each of our tasks and groups, which have no YAML file each"),
    Need("lm_eval.tasks._index", "Kind.TASK", (), "the kind of such an entry"),
    Need("lm_eval.tasks._index", "Kind.GROUP", (), "the kind of such an entry"),
    Need("lm_eval.tasks._yaml_loader", "load_yaml", ("path",),
         "reads our YAML with its !function tags"),
    Need("lm_eval.config.evaluate_config", "EvaluatorConfig.process_tasks", ("metadata",),
         "patched: reads the MMLU files before the model is loaded"),
    Need("lm_eval.config.evaluate_config", "EvaluatorConfig", ("tasks", "metadata"),
         "tells which MMLU files those are"),
    Need("lm_eval.loggers", "EvaluationTracker.save_results_aggregated", (),
         "patched: lm_eval swallows errors while it saves, and exits with 0"),
    Need("lm_eval.loggers", "EvaluationTracker.save_results_samples", ("task_name", "samples"),
         "patched: as above"),
    Need("lm_eval.loggers.utils", "add_env_info", ("storage",),
         "takes its description of the environment from torch, where we replace it"),
    Need(_HFLM, "HFLM._create_model", ("pretrained",),
         "overridden: it can't quantise with transformers 5 or keep an adapter unmerged"),
    Need(_HFLM, "HFLM._loglikelihood_tokens", ("requests", "disable_tqdm", "override_bs"),
         "overridden and called: scores token ids, with our float32 output head"),
    Need(_HFLM, "HFLM._encode_pair", ("context", "continuation"),
         "the benchmark times encoding and scoring separately"),
    Need(_HFLM, "HFLM.model", (), "overridden: public, but set through the private _model"),
    Need(_HFLM, "HFLM.rank", (), "overridden: HFLM counts local processes, and on GPUs only"),
    Need(_HFLM, "HFLM.world_size", (), "overridden: as above"),
)  # fmt: skip
