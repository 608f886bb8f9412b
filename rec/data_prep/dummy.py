"""A synthetic dataset with structure worth learning, made offline in seconds.

    python -m rec.data_prep.dummy --output-dir data/dummy
    python -m rec.data_prep.dummy --output-dir data/shop --shop      views, carts and purchases

- Taste: a user belongs to a segment and prefers some genres, which all features tell about.
- Popularity follows Zipf's law inside a genre.
- Order: an item is often followed by its sequel ("Silver Western" by "Silver Western 2"), and a genre by another one
  (a Markov chain). A model of sequences beats a model of sets, which clearly beats popularity.
- Ratings (1 to 5) rise with the user's taste for the genre; times come in sessions over one year.
- In a shop, most interactions are views. Some items are viewed often and hardly ever bought, and users buy what suits
  their taste. Validation and test ask for purchases.

The same flags give the same bytes. Not covered: drift of taste and fashion over the year.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection

from rec.data_prep.events import Events, weigh_events
from rec.data_prep.write import NO_EVENTS, output_parser, prepare
from rec.errors import UserError, note, run_command
from rec.ops.spark import ENGINES

START = 1_672_531_200  # 2023-01-01 in seconds since 1970
DAY = 86_400
YEAR = 365 * DAY
SEQUEL = 0.4  # how often an item is followed by its sequel, where it has one
FOLLOW = 0.3  # otherwise: how often its genre is followed by that genre's usual successor, not by the user's taste

SEGMENTS = ["student", "commuter", "parent", "collector", "gamer", "retiree"]
GENRES, ADJECTIVES, PLACES = map(
    str.split,
    (
        "Adventure Comedy Crime Documentary Drama Fantasy Horror Mystery Romance Space War Western",
        """Silver Crimson Hidden Broken Quiet Golden Savage Frozen Electric Lonely Wandering Midnight Velvet
        Burning Distant Forgotten Restless Emerald Hollow Paper Iron Scarlet Sleeping Secret Wild Gentle Bitter Lucky
        Final Endless Northern Invisible Crooked Amber Foolish Sacred Stolen Thirsty Painted Borrowed""",
        "Oslo Lima Kyoto Cairo Havana Lisbon Quebec Delhi Samoa Tunis Prague Dakar Perth Riga Quito Malta",
    ),
)
SHOP = Events({"view": 1.0, "cart": 3.0, "purchase": 10.0}, targets=("purchase",))
LEAST = {"users": 10, "items": 20, "interactions_per_user": 3, "seed": 0}  # of the options


def generate(
    users: int, items: int, interactions_per_user: int, seed: int, *, shop: bool = False
) -> dict[str, pa.Table]:
    """The tables `users`, `items` and `interactions` (in order of time), of about the sizes asked for.

    `shop`: interactions have a column `event`.
    """
    rng = np.random.default_rng(seed)
    genre, sequel, item_table = _make_items(items, rng)
    taste, user_table = _make_users(users, rng)
    per_user = rng.gamma(2.0, interactions_per_user / 2.0, users).astype(int)
    per_user = np.clip(per_user, 3, most_per_user(items))
    user, item = _walk(taste, genre, sequel, per_user, rng)
    time = _times(user, rng)

    liking = taste[user, genre[item]] / taste.max(axis=1)[user]
    quality = rng.normal(0.0, 0.5, items)[item]
    rating = np.clip(np.rint(2.2 + 2.0 * liking + quality + rng.normal(0.0, 0.5, len(item))), 1, 5)

    order = np.lexsort((user, time))
    ids = [user_table["user_id"].take(user[order]), item_table["item_id"].take(item[order])]
    columns = [*ids, time[order], rating[order].astype(np.float32), np.arange(len(order))]
    interactions = pa.table(columns, ["user_id", "item_id", "timestamp", "rating", "source_row"])
    if shop:
        event = _events(liking, item, rng)
        interactions = interactions.append_column("event", pa.array(event[order]))
    return {"users": user_table, "items": item_table, "interactions": interactions}


def most_per_user(items: int) -> int:
    """The most interactions of a user: half of the catalogue, so that there is something left to recommend."""
    return max(items // 2, 3)


def _make_items(items: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Main genre [items], sequel [items] (-1 where there is none) and the table of features."""
    lengths = np.minimum(rng.geometric(0.35, items), 8)
    series = np.repeat(np.arange(items), lengths)[:items]
    volume = pd.Series(series).groupby(series).cumcount().to_numpy() + 1
    sequel = np.where(np.diff(series, append=-1) == 0, np.arange(1, items + 1), -1)

    genre = rng.integers(len(GENRES), size=items)[series]
    has_second = rng.random(items) < 0.4
    second = np.where(has_second, rng.integers(len(GENRES), size=items), genre)[series]
    pairs = zip(genre, second, strict=True)
    genres = [list(dict.fromkeys([GENRES[main], GENRES[other]])) for main, other in pairs]

    # Each series has a name of its own among 680, then they come again.
    name = rng.permutation(series[-1] + 1)[series]
    numbers = np.stack([name, genre, volume], axis=1).tolist()
    titles = [_title(*each) for each in numbers]
    price = rng.uniform(5.0, 40.0, len(GENRES))[genre] * rng.lognormal(0.0, 0.25, items)
    days_before = rng.integers(3650, size=items)[series]
    released = START - 3 * YEAR - days_before * DAY + (volume - 1) * 120 * DAY
    columns = {
        "item_id": [f"i{number + 1}" for number in range(items)],
        "title": titles,
        "genres": genres,
        "price": price.round(2),
        "released": released,
    }
    return genre, sequel, pa.table(columns)


def _title(name: int, genre: int, volume: int) -> str:
    """Such as "Silver Western of Lima 2"."""
    title = f"{ADJECTIVES[name % 40]} {GENRES[genre]}"
    place = name // 40 % 17
    if place:
        title += f" of {PLACES[place - 1]}"
    return f"{title} {volume}" if volume > 1 else title


def _make_users(users: int, rng: np.random.Generator) -> tuple[np.ndarray, pa.Table]:
    """Taste [users, genres], rows of probabilities, and the table of features."""
    centre = rng.dirichlet(np.full(len(GENRES), 0.3), len(SEGMENTS))
    segment = rng.integers(len(SEGMENTS), size=users)
    draws = rng.standard_gamma(8.0 * centre[segment] + 0.05) + 1e-3
    taste = draws / draws.sum(axis=1, keepdims=True)  # of a Dirichlet distribution
    age = np.linspace(20, 68, len(SEGMENTS))[segment] + rng.normal(0.0, 5.0, users)
    columns = {
        "user_id": [f"u{number + 1}" for number in range(users)],
        "age": np.clip(age, 14, 90).astype(np.int64),
        "segment": np.array(SEGMENTS)[segment],
    }
    return taste, pa.table(columns)


def _events(liking: np.ndarray, item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What each interaction is: the more an item suits the user, and the better it sells, the more it is bought."""
    sells = rng.beta(0.5, 0.5, item.max() + 1)[item]
    chance = rng.random(len(item))
    wanted = liking * sells
    return np.select([chance < 0.6 * wanted, chance < wanted], ["purchase", "cart"], "view")


def _walk(
    taste: np.ndarray,
    genre: np.ndarray,
    sequel: np.ndarray,
    per_user: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """User and item [interactions] of all users' walks through the catalogue, all users a step at a time.

    Users meet no item twice: walks are twice as long as asked for, then repetitions are cut out and the rest to length.
    """
    by_genre = np.argsort(genre, kind="stable")
    starts = np.searchsorted(genre[by_genre], np.arange(len(GENRES) + 1))
    weight = 1.0 / (rng.permutation(len(genre)) + 10.0) ** 0.9  # Zipf, flattened at the head
    weight[sequel[sequel >= 0]] *= 0.3  # few begin a series in the middle
    cumulative = np.r_[0.0, np.cumsum(weight[by_genre])]
    low, high = cumulative[starts[:-1]], cumulative[starts[1:]]
    has_items = high > low
    likes = np.cumsum(taste * has_items, axis=1)
    likes /= likes[:, -1:]
    successor = np.roll(np.arange(len(GENRES)), 1)

    steps = 2 * per_user + 5
    longest_first = np.argsort(-per_user, kind="stable")
    item = np.full(len(steps), -1)  # the one that each user is at
    parts = []
    for step in range(steps.max()):
        active = longest_first[steps[longest_first] > step]
        here, chance = item[active], rng.random((4, len(active)))
        wanted = (likes[active] < chance[0, :, None]).sum(axis=1)
        if step:
            follower = successor[genre[here]]
            wanted = np.where((chance[1] < FOLLOW) & has_items[follower], follower, wanted)
        point = low[wanted] + chance[2] * (high - low)[wanted]
        position = np.searchsorted(cumulative, point, side="right") - 1
        drawn = by_genre[np.clip(position, starts[wanted], starts[wanted + 1] - 1)]
        if step:
            is_sequel = (chance[3] < SEQUEL) & (sequel[here] >= 0)
            drawn = np.where(is_sequel, sequel[here], drawn)
        item[active] = drawn
        parts.append(pd.DataFrame({"user": active, "item": item[active]}))
    walk = pd.concat(parts).drop_duplicates().sort_values("user", kind="stable")
    walk = walk[(walk.groupby("user").cumcount() < per_user[walk["user"]]).to_numpy()]
    return walk["user"].to_numpy(), walk["item"].to_numpy()


def _times(user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Seconds since 1970, rising within a user (whose rows lie together): minutes in a session, days between."""
    minutes = 60.0 + rng.exponential(900.0, len(user))
    is_same_session = rng.random(len(user)) < 0.75
    gap = np.where(is_same_session, minutes, rng.exponential(6.0 * DAY, len(user)) + 3600.0)
    elapsed = np.cumsum(gap)
    begins, ends = np.searchsorted(user, user), np.searchsorted(user, user, side="right") - 1
    elapsed, span = elapsed - elapsed[begins], elapsed[ends] - elapsed[begins]
    elapsed *= np.minimum(1.0, 0.9 * YEAR / np.maximum(span, 1.0))
    joined = rng.random(user[-1] + 1)[user] * (YEAR - np.minimum(span, 0.9 * YEAR))
    return (START + joined + elapsed).astype(np.int64)


def main() -> None:
    """The command."""
    parser = output_parser("rec.data_prep.dummy", __doc__)
    add = parser.add_argument
    add("--users", type=int, default=1000)
    add("--items", type=int, default=500)
    add("--interactions-per-user", type=int, default=30, help="on average; at least 3")
    add("--seed", type=int, default=42, help="the same seed and sizes give the same bytes")
    add("--shop", action="store_true", help="views, carts and purchases in place of one event")
    add("--split", choices=["temporal", "leave_one_out"], default="leave_one_out")
    args = parser.parse_args()
    for name, least in LEAST.items():
        size = getattr(args, name)
        if size < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {size}")
    per_user = args.interactions_per_user
    most = most_per_user(args.items)

    def load(con: Connection, scratch: Path) -> dict[str, int]:
        note(f"generating {args.users:,} users and {args.items:,} items")
        if per_user > most:
            problem = f"is more than half of the {args.items} items: no user gets more than {most}"
            note(f"--interactions-per-user {per_user} {problem}")
        tables = generate(args.users, args.items, per_user, args.seed, shop=args.shop)
        for name, table in tables.items():
            con.from_arrow(table).create(name)
        if args.shop:
            weigh_events(con, SHOP)
        return {}

    prepare(
        args.output_dir,
        load,
        name="dummy",
        source=f"synthetic: {args.users} users, {args.items} items, seed {args.seed}",
        strategy=args.split,
        seed=args.seed,
        engine=ENGINES[args.engine],
        events=SHOP if args.shop else NO_EVENTS,
        wait=args.wait,
    )


if __name__ == "__main__":
    run_command(main)
