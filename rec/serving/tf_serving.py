"""The models on a fleet of other machines, by TF Serving's REST API. Nothing of TensorFlow is imported here.

    python -m rec.serve --tf-serving http://a:8501,http://b:8501     both with the models `retrieval` and `ranking`

- A replica that fails or is late is passed over for the next, and last in turn for a while; where none answers: a 503.
- Every call names the version of the local bundle, so that answers fit the local items.parquet: let the fleet keep two
  versions (model_version_policy {latest {num_versions: 2}}), or none answers while one replaces the other.

TF Serving itself was not run here. The tests speak its REST protocol (https://www.tensorflow.org/tfx/serving/api_rest)
with a stand-in that runs the bundles through the C++ loader that TF Serving uses.

Not covered: gRPC, balancing by load, and a narrow filter's best items, in whose place popular ones follow.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd

from rec.bundles.files import check_pair, read_catalogue, read_metadata
from rec.serving.schemas import LOWEST, UnavailableError

PAUSE = 10.0  # seconds for which a replica that failed is only asked after the others
FAILURES = (httpx.HTTPError, httpx.InvalidURL)


@dataclass(eq=False)
class TfServing:
    """What rec.bundles.recommender.Recommender does, with the models elsewhere; UnavailableError where none answers."""

    replicas: list[str]
    client: httpx.Client
    items: pd.DataFrame
    users: list[str]
    metadata: dict[str, dict[str, Any]]
    _failed: dict[str, float] = field(default_factory=dict)  # when a replica failed last

    def answer(
        self,
        user_ids: Sequence[str],
        histories: Sequence[list[str] | None],
        excluded: Sequence[list[str]],
    ) -> dict[str, np.ndarray]:
        users, given = list(user_ids), [history is not None for history in histories]
        lists = _padded([history or [] for history in histories])
        asked: dict[str, list[Any]] = {"user_id": users, "is_given": given, "history": lists}
        if any(given) or any(excluded):
            found = self._call("retrieval", "answer", {**asked, "exclude": _padded(excluded)})
        else:
            found = self._call("retrieval", "answer_known", {"user_id": users})
        scores, cold = np.array(found["score"], np.float32), np.array(found["cold"])
        parts = {"rows": np.array(found["row"]), "retrieved": scores}
        if "ranking" in self.metadata:
            n = self.metadata["ranking"]["config"]["ranking"]["candidates"]
            ranked = self._call(
                "ranking", "answer", {**asked, "item_id": [row[:n] for row in found["item_id"]]}
            )
            scores = np.full_like(scores, LOWEST)  # what is not ranked follows in retrieval's order
            scores[:, :n] = np.where(cold[:, None], parts["retrieved"][:, :n], ranked)
        order = np.argsort(-scores, axis=1, kind="stable")
        ordered = {
            name: np.take_along_axis(part, order, 1)
            for name, part in {**parts, "scores": scores}.items()
        }
        return {**ordered, "ranks": order + 1, "cold": cold}

    def answer_within(self, user_id: str, history: list[str] | None, rows: np.ndarray) -> None:
        """It cannot be done here: a filter's rows belong to one request, and TF Serving batches every input."""

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = self._call("retrieval", "similar_items", {"item_id": item_ids})
        rows = self.items.index.get_indexer(pd.Index(np.ravel(found["item_id"])))
        return rows.reshape(len(item_ids), -1), np.array(found["score"], np.float32)

    def histories(self, user_ids: list[str]) -> list[list[str]]:
        stored = self._call("retrieval", "history", {"user_id": user_ids})
        return [[item for item in row if item] for row in stored]

    def cosines(self, items: list[str], others: list[str]) -> np.ndarray:
        """[N, H], known of the items that are among the others' nearest; float32's lowest elsewhere."""
        near = [
            dict(zip(*pair, strict=True))
            for pair in zip(*(x.tolist() for x in self.similar(others)), strict=True)
        ]
        rows = self.items.index.get_indexer(pd.Index(items)).tolist()
        return np.array([[each.get(row, LOWEST) for each in near] for row in rows], np.float32)

    def close(self) -> None:
        self.client.close()

    def _call(self, stage: str, signature: str, inputs: dict[str, list[Any]]) -> Any:
        """A signature's outputs by name; its only output, without a name."""
        path = f"/v1/models/{stage}/versions/{self.metadata[stage]['version']}:predict"
        self.replicas.append(self.replicas.pop(0))  # each in turn
        for replica in sorted(
            self.replicas, key=lambda each: self._failed.get(each, 0) > time.monotonic() - PAUSE
        ):
            try:
                answer = self.client.post(
                    replica + path, json={"signature_name": signature, "inputs": inputs}
                )
                return answer.json()["outputs"]
            except FAILURES as error:
                reason = str(error) or type(error).__name__
            except (
                ValueError,
                LookupError,
                TypeError,
            ):  # an error is {"error": ..}, a proxy's error a page
                reason = f"{answer.status_code} {' '.join(answer.text.split())[:200]}"
            self._failed[replica] = time.monotonic()
        raise UnavailableError(
            f"no TF Serving answers for {stage}; the last that was asked, {replica}: {reason}"
        )


def connect(
    urls: Sequence[str],
    retrieval: Path,
    ranking: Path | None,
    allow_mismatch: bool = False,
    timeout: float = 2.0,
) -> TfServing:
    """A fleet that has these bundles loaded.

    Args:
      urls: of the REST ports; one may hold several, separated by commas.
      retrieval, ranking: on this machine, for their metadata, items and users. timeout: seconds for each answer.

    Raises:
      UserError: a directory is not a bundle, or the two were not trained together.
      UnavailableError: no replica has their versions, or not yet.
    """
    replicas = [url.strip().rstrip("/") for each in urls for url in each.split(",") if url.strip()]
    stages = {"retrieval": retrieval} | ({"ranking": ranking} if ranking else {})
    metadata = {stage: read_metadata(bundle, stage) for stage, bundle in stages.items()}
    if ranking and not allow_mismatch:
        check_pair(metadata["retrieval"], metadata["ranking"], ranking)
    client, said = httpx.Client(timeout=timeout), []
    for replica in replicas:
        try:
            answers = [
                client.get(f"{replica}/v1/models/{s}/versions/{m['version']}")
                for s, m in metadata.items()
            ]
            if all('"AVAILABLE"' in answer.text for answer in answers):
                return TfServing(replicas, client, *read_catalogue(retrieval), metadata)
            said += [f"{replica}: {' '.join(answer.text.split())[:200]}" for answer in answers]
        except FAILURES as error:
            said.append(f"{replica}: {error}")
    names = " and ".join(f"{stage} version {each['version']}" for stage, each in metadata.items())
    raise UnavailableError(
        f"--tf-serving: no replica has {names} loaded ({'; '.join(said) or 'there is no URL'})"
    )


def _padded(lists: Sequence[list[str]]) -> list[list[str]]:
    """Lists of ids with "" on the left, to a common length of at least one."""
    width = max(1, *map(len, lists))
    return [[""] * (width - len(row)) + row for row in lists]
