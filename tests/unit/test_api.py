"""``import invar_ray``: quick, whole, and it refuses to answer from what nobody trained."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import invar_ray
from invar_ray.answering.followup import Turn
from invar_ray.answering.fusion import fuse_hits
from invar_ray.errors import ArtifactError, MissingArtifactError, RequestError
from invar_ray.losses import alignment_loss, contrastive_loss, invariance_loss
from invar_ray.models.adapters import new_adapter, save_adapter
from invar_ray.models.loading import open_model
from invar_ray.store.artifacts import Artifact, Plan
from invar_ray.store.published import Published
from tests.support import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A store of its own: what is newest in it counts."""
    return World(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def generator(world: World) -> Artifact:
    def body(building: object) -> None:
        model = new_adapter(open_model(world.base, world.store)[0], world.config.generator.lora, 0)
        folder = building.path / "adapter"  # type: ignore[attr-defined]
        save_adapter(model, model.state_dict(), folder, world.base.location)
        building.info |= {  # type: ignore[attr-defined]
            "base": vars(world.base),
            "max_context": 160,
            "max_new_tokens": 4,
        }

    return world.get(Plan("generator", "tiny", {}, {"model": world.base_artifact}), body)


@pytest.fixture
def rag(world: World, generator: Artifact) -> invar_ray.Rag:
    return invar_ray.open_rag(world.store.root_uri, index=world.adapter_index.uri, k=3)


def test_the_package_offers_what_it_names_and_no_more() -> None:
    assert 8 <= len(invar_ray.__all__) <= 12
    for name in invar_ray.__all__:
        assert getattr(invar_ray, name).__doc__, name
    assert set(invar_ray.__all__) <= set(dir(invar_ray))
    with pytest.raises(AttributeError, match="nothing_such"):
        invar_ray.nothing_such  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.process_time(); import invar_ray; "
        "assert time.process_time() - t < 0.1; "
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'pydantic', 'pyarrow'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_asking_needs_neither_ray_nor_deepspeed() -> None:
    code = (
        "import sys, invar_ray; invar_ray.open_rag; "
        "sys.exit(' '.join({'ray', 'deepspeed'} & set(sys.modules)) or 0)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_search_asks_the_index_and_loads_no_generator(rag: invar_ray.Rag) -> None:
    hits = rag.search("Who built the lighthouse of Arvon?", k=5)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert hits == rag.search_all(["Kelda?", "Who built the lighthouse of Arvon?"], k=5)[1]
    assert len(rag.search("Kelda?")) == 3
    assert "generator" not in vars(rag)
    with pytest.raises(RequestError):
        rag.search("  ")


def test_vectors_of_the_api_are_those_of_the_index(world: World, rag: invar_ray.Rag) -> None:
    texts = [("Arvon", "Arvon is an island."), ("", "Ferries sail.")]
    ours = rag.retriever.encode_passages(texts)
    assert ours.shape[0] == 2
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rag.retriever.encode_passages(["Ferries sail."])[0], ours[1])
    query = rag.retriever.encode_queries(["Kelda?"])
    # A hybrid score is no cosine.
    ((best,),) = rag.retriever.retrieve(["Kelda?"], 1, mode="dense")
    assert best.score == pytest.approx(
        float((query @ rag.retriever.encode_passages(_texts(world, rag)).T).max()), abs=1e-4
    )


def _texts(world: World, rag: invar_ray.Rag) -> list[str | tuple[str, str]]:
    rows = rag.retriever.passages.rows(range(len(rag.retriever.passages)))
    return [(row.title, row.text) for row in rows]


def test_an_answer_rests_on_the_passages_that_a_search_finds(rag: invar_ray.Rag) -> None:
    question = "Who built the lighthouse of Arvon?"
    answer = rag.ask(question, k=2)
    found = [hit.passage_id for hit in rag.search(question, 2)]
    assert [hit.passage_id for hit in answer.hits] == found[: len(answer.hits)]
    assert isinstance(answer, invar_ray.Answer)


def test_a_follow_up_counts_as_asked_and_as_read(rag: invar_ray.Rag) -> None:
    turns = [Turn("Who built the lighthouse of Arvon?", "Mara Voss")]
    answer = rag.ask("When did she die?", turns=turns)
    assert answer.question != "When did she die?"
    made, asked = rag.search_all([answer.question, "When did she die?"])
    # What it is read as weighs twice.
    wanted = [hit.passage_id for hit in fuse_hits([made, made, asked], rag.k)]
    assert [hit.passage_id for hit in answer.hits] == wanted[: len(answer.hits)]
    alone = "Who built the lighthouse of Arvon?"
    assert rag.ask(alone, turns=turns).question == alone


def test_stability_is_the_mean_overlap_of_what_the_wordings_find(rag: invar_ray.Rag) -> None:
    found = rag.stability("Who built the lighthouse of Arvon?", k=4, rewrites=2)
    assert len(found.wordings) == len(found.hits) == 3
    assert len(set(found.wordings)) == 3
    sets = [{hit.passage_id for hit in hits} for hits in found.hits]
    pairs = [(sets[0], sets[1]), (sets[0], sets[2]), (sets[1], sets[2])]
    assert found.overlap == pytest.approx(sum(len(a & b) / len(a | b) for a, b in pairs) / 3)


def test_it_refuses_to_answer_from_what_nobody_trained(tmp_path: Path) -> None:
    world = World(tmp_path)
    root = world.store.root_uri
    with pytest.raises(MissingArtifactError, match="no index"):
        invar_ray.open_rag(root)
    world.base_index  # noqa: B018
    with pytest.raises(ArtifactError, match="never trained to find"):
        invar_ray.open_rag(root)
    plain = invar_ray.open_rag(root, untrained=True)
    assert plain.generator_artifact is None
    assert len(plain.search("Kelda?", k=2)) == 2
    Published(world.store).publish([world.adapter_index], verify=False)
    searching = invar_ray.open_rag(root)
    assert len(searching.search("Kelda?", k=2)) == 2
    with pytest.raises(MissingArtifactError, match="no generator"):
        searching.ask("Kelda?")


def test_it_refuses_while_another_run_makes_a_new_index(world: World, generator: Artifact) -> None:
    root = world.store.root_uri
    Published(world.store).publish([world.adapter_index], verify=False)
    invar_ray.open_rag(root)
    lock = Path(world.store.root) / ".locks" / "vectors-0123456789abcdef"
    lock.parent.mkdir(exist_ok=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another run is making vectors-0123456789abcdef"):
            invar_ray.open_rag(root)
        invar_ray.open_rag(root, index=world.adapter_index.uri)  # who names one means it
    invar_ray.open_rag(root)


def test_losses_take_plain_tensors() -> None:
    torch.manual_seed(0)
    cosines = torch.rand(4, 3, 6) * 2 - 1
    cosines.requires_grad_()
    own, every = torch.arange(4), torch.ones(4, 6, dtype=torch.bool)
    for loss in (contrastive_loss, invariance_loss):
        plain = loss(cosines)
        assert torch.equal(plain.loss, loss(cosines, own, every).loss)
        plain.loss.backward()
    teacher = torch.rand(4, 6)
    plain_alignment = alignment_loss(cosines[:, 0], teacher)
    assert torch.equal(plain_alignment.loss, alignment_loss(cosines[:, 0], teacher, every).loss)
    same = cosines[:, :1].expand(-1, 3, -1)
    assert invariance_loss(same).loss == 0
    with pytest.raises(ValueError, match="3 candidates for 4 rows"):
        contrastive_loss(cosines[:, :, :3])


def test_langchain_finds_what_a_search_finds(rag: invar_ray.Rag) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.vectorstores import InMemoryVectorStore

    from invar_ray.langchain import InvarEmbeddings, InvarRetriever

    question = "Who built the lighthouse of Arvon?"
    found = InvarRetriever(rag=rag, k=4).invoke(question)
    hits = rag.search(question, 4)
    assert [(d.id, d.page_content) for d in found] == [(h.passage_id, h.text) for h in hits]
    assert found[0].metadata["title"] == hits[0].title
    store = InMemoryVectorStore(InvarEmbeddings(rag))
    store.add_texts([hit.text for hit in hits])
    [(best, score)] = store.similarity_search_with_score(hits[2].text, k=1)
    assert best.page_content in {hit.text for hit in hits}
    assert score <= 1.0001
