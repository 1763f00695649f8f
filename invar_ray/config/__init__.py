"""What a run is: frozen dataclasses, loaded from a YAML recipe plus ``key=value`` overrides.

Fields fall in two kinds.  *Science* fields say what is computed (model, pooling, losses, seeds,
global batch); they enter the fingerprints of artifacts.  *Scale* fields say on what (workers, GPUs,
micro batch); they live in :class:`ScaleConfig`, :class:`StorageConfig` and :class:`ServeConfig`
(and in ``experimental.scale``) only, and never enter a fingerprint.

Every setting stands with its meaning and its constraint in a file named for what it is about:
``corpus``, ``models``, ``training``, ``measuring``, ``scale``, ``experimental``.  ``run`` joins
them, ``load`` reads recipes, ``faults`` words what is refused.
"""

from invar_ray.config.corpus import CorpusConfig, QuestionsConfig, RewritesConfig, StorageConfig
from invar_ray.config.experimental import (
    ExperimentalConfig,
    ExperimentalGenerator,
    ExperimentalModel,
    ExperimentalRetriever,
    ExperimentalScale,
    TinyConfig,
)
from invar_ray.config.fields import METADATA_NAME, PASSAGE_FIELDS
from invar_ray.config.load import arm_config, config_keys, load_config, recipe_names, to_dict
from invar_ray.config.measuring import EvaluationConfig, IndexConfig, SearchConfig
from invar_ray.config.models import CoarseConfig, LoraConfig, ModelConfig
from invar_ray.config.run import Config
from invar_ray.config.scale import ScaleConfig, ServeConfig
from invar_ray.config.training import GeneratorConfig, OptimizerConfig, RetrieverConfig

__all__ = [
    "METADATA_NAME",
    "PASSAGE_FIELDS",
    "CoarseConfig",
    "Config",
    "CorpusConfig",
    "EvaluationConfig",
    "ExperimentalConfig",
    "ExperimentalGenerator",
    "ExperimentalModel",
    "ExperimentalRetriever",
    "ExperimentalScale",
    "GeneratorConfig",
    "IndexConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "QuestionsConfig",
    "RetrieverConfig",
    "ScaleConfig",
    "SearchConfig",
    "ServeConfig",
    "StorageConfig",
    "TinyConfig",
    "RewritesConfig",
    "arm_config",
    "config_keys",
    "load_config",
    "recipe_names",
    "to_dict",
]
