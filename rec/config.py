"""The configuration: strict YAML into frozen dataclasses. An unknown key is an error that names the nearest known one.

Every key of every YAML file is a field below, with its default; the comment beside it says what it does.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Features:
    """Which columns of users.parquet and items.parquet the models read: `auto`, or {column: kind}.

    Kinds: categorical, multi (a list, such as genres), numeric, text (title tokens), time (seconds since 1970).
    `auto` takes every column and its kind from its type; `{}` takes none.
    """

    users: str | dict[str, str] = "auto"
    items: str | dict[str, str] = "auto"


@dataclass(frozen=True)
class Retrieval:
    arch: str = "two_tower"  # query tower; see rec/retrieval/towers.py
    embedding_dim: int = 64
    layers: int = 2  # transformer blocks or recurrent layers; two_tower ignores it
    heads: int = 2  # attention heads of sasrec
    dropout: float = 0.2
    window: int = 50  # positions a training example; also the longest history that a tower reads
    epochs: int = 20  # at most: early stopping on val/ndcg@10
    patience: int = 5  # epochs without a better val/ndcg@10 before training stops
    batch_size: int = 64  # windows a step
    learning_rate: float = 0.001
    temperature: float = 1.0
    logq: bool = True  # correct sampled logits by log of the sampling probability
    in_batch_negatives: int = 512  # targets of other examples in the batch, shared by all; 0 = none
    uniform_negatives: int = 512  # items drawn uniformly from the catalogue, shared by all; 0 = none
    hard_negatives: int = 0  # keep only the n highest-scored negatives of each position; 0 = all
    mask_accidental_hits: bool = True  # a negative that is the position's own target does not count
    mask_user_positives: bool = True  # nor does one that the user has interacted with elsewhere in the window
    user_id: bool = True  # the query tower embeds the user id
    query_time: bool = False  # the query tower reads the hour and weekday of the request


@dataclass(frozen=True)
class Ranking:
    arch: str = "mlp"  # mlp, dlrm or dcn
    objective: str = "implicit"  # implicit: clicks on mined candidates; rating: squared error on ratings
    candidates: int = 100  # length of a candidate list
    holdout: float = 0.15  # latest share of the training interactions that labels the candidate lists
    embedding_dim: int = 32
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.2
    epochs: int = 10
    patience: int = 2
    batch_size: int = 64  # candidate lists a step (implicit), 1,024 ratings a step where `rating`
    learning_rate: float = 0.001


@dataclass(frozen=True)
class Index:
    kind: str = "scann"  # scann, or exact (brute force; loads in a stock TF Serving)
    recall_target: float = 0.95  # recall@k against the exact index that ScaNN's settings are searched for
    k: int = 100  # candidates that the retrieval bundle returns
    max_seen: int = 1000  # items of a known user's history that the bundle stores and excludes


@dataclass(frozen=True)
class Output:
    checkpoints: str = "checkpoints"
    savedmodels: str = "savedmodels"


@dataclass(frozen=True)
class Config:
    dataset: str  # a dataset directory, as written by rec.data_prep
    use_wandb: bool = False
    seed: int = 42
    features: Features = field(default_factory=Features)
    retrieval: Retrieval = field(default_factory=Retrieval)
    ranking: Ranking = field(default_factory=Ranking)
    index: Index = field(default_factory=Index)
    output: Output = field(default_factory=Output)
