"""The models on a fleet of other machines, by TF Serving's REST API, without TensorFlow in this process.

    python -m rec.serve --tf-serving http://a:8501,http://b:8501     both with the models `retrieval` and `ranking`

- If a replica fails or is late, the next one is tried, and the first comes last for a while. If none answers: a 503.
- Every call names the version of the local bundle, so that answers fit the local items.parquet. So the fleet must keep
  two versions (model_version_policy {latest {num_versions: 2}}), or none answers while one replaces the other.

TF Serving itself was not run here. The tests speak its REST protocol (https://www.tensorflow.org/tfx/serving/api_rest)
with a stand-in that runs the bundles through the C++ loader that TF Serving uses.

Not covered: gRPC, balancing by load, and the best items of a narrow filter, or of a `max_per` for which the candidates
are not enough: popular ones take their place. `diversity` and explanations read the local bundle's vectors.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd

from rec.bundles.files import read_catalogue, read_pair
from rec.bundles.metadata import PairMetadata
from rec.bundles.pair import NUMPY, Candidates, pad_left, rerank
from rec.serving.schemas import UnavailableError

PAUSE = 10.0  # seconds for which a replica that failed is only asked after the others
FAILURES = (httpx.HTTPError, httpx.InvalidURL)


@dataclass(eq=False)
class TfServing:
    """A `Backend` whose models are elsewhere. Raises UnavailableError if no replica answers."""

    replicas: list[str]
    client: httpx.Client
    items: pd.DataFrame
    users: list[str]
    vectors: np.ndarray
    metadata: PairMetadata
    _failed: dict[str, float] = field(default_factory=dict)  # when a replica failed last

    def answer(
        self,
        user_ids: Sequence[str],
        histories: Sequence[list[str] | None],
        excluded: Sequence[list[str]],
        exclude_seen: Sequence[bool] | None = None,
    ) -> Candidates:
        inputs = {
            "user_id": user_ids,
            "is_given": [history is not None for history in histories],
            "history": pad_left([history or [] for history in histories], 1),
        }
        usual = [self.metadata.retrieval.excludes_seen] * len(user_ids)
        outputs = self._retrieve(inputs, excluded, exclude_seen or usual)
        retrieved = {name: np.array(outputs[name]) for name in ("row", "score", "cold")}
        retrieved["score"] = retrieved["score"].astype(np.float32)
        n = self.metadata.candidates
        if n is None:
            return rerank(NUMPY, retrieved, retrieved["score"], None)
        items = [row[:n] for row in outputs["item_id"]]
        ranked = self._call("ranking", "answer", {**inputs, "item_id": items})
        return rerank(NUMPY, retrieved, np.array(ranked, np.float32), n)

    def _retrieve(
        self, inputs: dict[str, Any], excluded: Sequence[list[str]], exclude_seen: Sequence[bool]
    ) -> Any:
        """What retrieval returns: looked up if nothing but user ids is given."""
        is_usual = set(exclude_seen) == {self.metadata.retrieval.excludes_seen}
        if is_usual and not any(inputs["is_given"]) and not any(excluded):
            return self._call("retrieval", "answer_known", {"user_id": inputs["user_id"]})
        exclusions = {"exclude": pad_left(excluded, 1), "exclude_seen": exclude_seen}
        return self._call("retrieval", "answer", inputs | exclusions)

    def answer_within(self, user_id: str, history: list[str] | None, rows: np.ndarray) -> None:
        """It cannot be done here: a filter's rows belong to one request, and TF Serving batches every input."""

    def similar(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = self._call("retrieval", "similar_items", {"item_id": item_ids})
        rows = self.items.index.get_indexer(pd.Index(np.ravel(found["item_id"])))
        return rows.reshape(len(item_ids), -1), np.array(found["score"], np.float32)

    def histories(self, user_ids: list[str]) -> list[list[str]]:
        return self._lists("history", user_ids)

    def disliked(self, user_ids: list[str]) -> list[list[str]]:
        return self._lists("disliked", user_ids)

    def _lists(self, signature: str, user_ids: list[str]) -> list[list[str]]:
        """What retrieval stores of each user, without the empty places."""
        stored = self._call("retrieval", signature, {"user_id": user_ids})
        return [[item for item in row if item] for row in stored]

    def _call(self, stage: str, signature: str, inputs: Mapping[str, Sequence[object]]) -> Any:
        """A signature's outputs by name; its only output, without a name."""
        path = f"/v1/models/{stage}/versions/{self.metadata.versions[stage]}:predict"
        body = {"signature_name": signature, "inputs": inputs}
        for replica in self._in_turn():
            try:
                answer = self.client.post(replica + path, json=body)
                return answer.json()["outputs"]
            except FAILURES as error:
                reason = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                reason = _shorten(answer)  # an error is {"error": ..}, that of a proxy a page
            self._failed[replica] = time.monotonic()
        raise UnavailableError(
            f"no TF Serving answers for {stage}; the last one tried was {replica}: {reason}"
        )

    def _in_turn(self) -> list[str]:
        """The replicas, another one first each time. Those that failed lately come last."""
        self.replicas.append(self.replicas.pop(0))
        late = time.monotonic() - PAUSE
        return sorted(self.replicas, key=lambda replica: self._failed.get(replica, 0) > late)


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
    metadata = read_pair(retrieval, ranking, allow_mismatch)
    client = httpx.Client(timeout=timeout)
    reasons = []
    for replica in replicas:
        reason = _missing(client, replica, metadata.versions)
        if reason is None:
            return TfServing(replicas, client, *read_catalogue(retrieval), metadata)
        reasons.append(f"{replica}: {reason}")
    names = " and ".join(
        f"{stage} version {version}" for stage, version in metadata.versions.items()
    )
    raise UnavailableError(
        f"--tf-serving: no replica has {names} loaded ({'; '.join(reasons) or 'there is no URL'})"
    )


def _missing(client: httpx.Client, replica: str, versions: dict[str, int]) -> str | None:
    """Why a replica cannot answer for these versions, or None."""
    try:
        for stage, version in versions.items():
            answer = client.get(f"{replica}/v1/models/{stage}/versions/{version}")
            if '"AVAILABLE"' not in answer.text:
                return _shorten(answer)
    except FAILURES as error:
        return str(error)
    return None


def _shorten(answer: httpx.Response) -> str:
    return f"{answer.status_code} {' '.join(answer.text.split())[:200]}"
