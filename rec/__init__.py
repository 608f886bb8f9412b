"""rec: a complete recommender system, from raw interactions to an API that answers with recommendations.

Importing this package switches TensorFlow to Keras 2, which TensorFlow Recommenders needs; nothing
has to be set by the user. TensorFlow itself is imported when `Recommender` is first used:

    from rec import Recommender

    Recommender.load("savedmodels").recommend("u7", k=5)
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rec.api import Recommender as Recommender

os.environ["TF_USE_LEGACY_KERAS"] = "1"
# TensorFlow's C++ notices; its errors reach Python as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Threads of ALS that spin while they wait hold each other up on a busy machine: 2.1 s per fit instead of 0.1 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Where TensorFlow is there already, tf.keras is chosen at its first use: too late only if that has happened.
HAS_KERAS_3 = "tensorflow" in sys.modules and hasattr(sys.modules["tensorflow"].keras, "version")
KERAS_3 = (
    "tf.keras was used before rec was imported, as Keras 3, with which TensorFlow Recommenders does not work: "
    "import rec first, or set TF_USE_LEGACY_KERAS=1 in the environment"
)
if HAS_KERAS_3 and not {"doctor", "rec.doctor"} & {*sys.orig_argv}:  # rec.doctor reports it
    raise ImportError(KERAS_3)

__version__ = "0.2.0.dev0"

# float32's lowest: the score of an empty place. Finite, because JSON has no infinity.
LOWEST = -3.4028234663852886e38


def __getattr__(name: str) -> object:
    if name == "Recommender":
        from rec.api import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
