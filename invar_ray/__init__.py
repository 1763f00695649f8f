"""invar_ray: invariant retrieval-augmented generation, trained, indexed and served on Ray.

    rag = invar_ray.open_rag("runs/demo")
    rag.search("Who painted Las Meninas?", k=5)
    rag.ask("Who painted Las Meninas?")

Names are loaded when they are first used: importing the package imports neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invar_ray.answering.retriever import Retriever
    from invar_ray.api import (
        Rag,
        evaluate,
        index_documents,
        open_rag,
        train_generator,
        train_retriever,
    )
    from invar_ray.config import Config, load_config
    from invar_ray.models.generator import Generator
    from invar_ray.schema import Answer, Hit

__version__ = "0.1.0"

__all__ = [
    "open_rag",
    "Rag",
    "Retriever",
    "Generator",
    "Answer",
    "Hit",
    "Config",
    "load_config",
    "index_documents",
    "train_retriever",
    "train_generator",
    "evaluate",
]

_ELSEWHERE = {"Config": "config", "load_config": "config", "Answer": "schema", "Hit": "schema"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'invar_ray' has no attribute {name!r}")
    return getattr(import_module(f"invar_ray.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
